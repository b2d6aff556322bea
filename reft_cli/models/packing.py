"""Whether a model keeps packed sequences apart; found by trying it, since it depends on each family's masks."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

FIRST, SECOND = [5, 6, 7, 8, 9], [10, 11, 12, 13]
CLOSE = 0.05  # of the logits' spread: rounding stays below in bfloat16, a wrong position does not


def keeps_packed_apart(model: PreTrainedModel) -> bool:
    """Two sequences in one row: the second one's logits have no gradient to the first, and equal those it has alone."""
    packed, first = _logits(model, [FIRST, SECOND])
    (leak,) = torch.autograd.grad(packed.square().sum(), first)
    alone, _ = _logits(model, [SECOND])
    apart = not leak[0, : len(FIRST)].any()
    return apart and bool((packed - alone).detach().abs().max() < CLOSE * alone.detach().std())


def _logits(model: PreTrainedModel, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(logits of the last sequence, embeddings of the whole row, which take gradients)."""
    device = model.device
    ids = torch.tensor([[token for sequence in sequences for token in sequence]], device=device)
    positions = torch.tensor([[at for sequence in sequences for at in range(len(sequence))]], device=device)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    output = model(inputs_embeds=embedded, position_ids=positions, use_cache=False)
    return output.logits[0, -len(sequences[-1]) :].float(), embedded
