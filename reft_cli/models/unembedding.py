"""The step from hidden states to logits, where it is one linear layer and nothing else."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

PROBE = [5, 6, 7, 8]
CLOSE = 0.01  # of the logits' spread


@torch.no_grad()
def linear_head(model: PreTrainedModel) -> nn.Linear | None:
    """The layer that makes a language model's logits from its decoder's output; None if the model does more.

    Found by trying it, since some models cap or scale their logits afterwards.
    """
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    if type(head) is not nn.Linear or decoder is None or decoder is model:
        return None
    ids = torch.tensor([PROBE], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    made = head(decoder(input_ids=ids, use_cache=False).last_hidden_state).float()
    return head if (made - logits).abs().max() <= CLOSE * logits.std() else None
