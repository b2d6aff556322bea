"""Whether a model's tokens see only those before them; found by trying it, since encoders load as decoders too."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from reft_cli.models.placement import entry_device

TOKENS = (5, 6, 7, 8)


def sees_ahead(model: PreTrainedModel) -> bool:
    """Whether the first token's logits have a gradient to a later token, as in an encoder: exactly none in a decoder.

    Such a model reads the answer that it is asked to predict, so that its loss means nothing.
    """
    tokens = torch.tensor([TOKENS], device=entry_device(model))
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_(True)  # [1, N, D]
    first = model(inputs_embeds=embedded, use_cache=False).logits[0, 0].float()  # [V]
    (slope,) = torch.autograd.grad(first.norm(), embedded)
    return bool(slope[0, 1:].nan_to_num(0.0).any())  # a model that overflows in half precision says nothing of it
