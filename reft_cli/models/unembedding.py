"""The step from hidden states to logits, where it is one linear layer and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_cli.models.placement import entry_device

PROBE = [5, 6, 7, 8]
FARTHEST = 1000.0  # far beyond real logits, so that a soft cap shows in any type


@torch.no_grad()
def linear_head(model: PreTrainedModel) -> nn.Linear | None:
    """The layer that makes a language model's logits from its decoder's output; None if the model does more, or
    if the layer's weights are fetched for each pass.

    Found by trying it: some models scale the hidden states before, or cap or scale the logits afterwards. What the
    layer is given has to be what the decoder returns, and made-up logits have to come through as they are.
    """
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    if type(head) is not nn.Linear or decoder is None or decoder is model or head.weight.is_meta:
        return None
    ids = torch.tensor([PROBE], device=entry_device(model))
    made_up = torch.linspace(-FARTHEST, FARTHEST, head.out_features, device=head.weight.device, dtype=head.weight.dtype)
    given: list[Tensor] = []

    def replace(_: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        given.append(args[0])
        return made_up.to(logits.device).expand_as(logits)

    with head.register_forward_hook(replace):
        seen = model(input_ids=ids, use_cache=False).logits
    made = decoder(input_ids=ids, use_cache=False).last_hidden_state
    same = torch.equal(given[0], made) and bool((seen == made_up.to(seen.device)).all())
    return head if same else None
