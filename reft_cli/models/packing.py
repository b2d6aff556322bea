"""Whether a model can be trained on packed sequences exactly; found by trying it, since it depends on each family."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reft_cli.models.attention import NotPackable, attending

LONG, SHORT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [16, 17, 18, 19]
CLOSE = 0.05  # of the logits' spread, in the mean over a token's logits: above what bfloat16 rounds away
STEEP = 0.25  # of a token's gradient: the same, through a whole model and back


def packing_inputs(lengths: list[int], device: torch.device | None = None) -> dict[str, Tensor | int]:
    """What a packed row carries besides its ids: positions that restart, and the sequences' boundaries."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.tensor([[position for length in lengths for position in range(length)]])
    longest = max(lengths)
    return {
        "position_ids": positions.to(device),
        "cu_seq_lens_q": bounds.to(device),
        "cu_seq_lens_k": bounds.to(device),
        "max_length_q": longest,
        "max_length_k": longest,
    }


def why_not_packed(model: PreTrainedModel) -> str | None:
    """None if packed training equals padded training, else the reason.

    Two sequences are packed, on the device and in the type that will train: each one's logits and their gradient must
    be those it has alone, and the second one's logits must have no gradient to the first.
    """
    apart = [_logits(model, [sequence], alone=True) for sequence in (LONG, SHORT)]
    alone = torch.cat([found.detach() for found, _ in apart])
    direction = alone / alone.norm()  # what is differentiated; of a size that float16 can hold
    try:
        with attending(model):
            logits, embedded = _logits(model, [LONG, SHORT])
            second = direction.clone()
            second[: len(LONG)] = 0
            leak = _slope(logits, embedded, second, keep=True)
            slope = _slope(logits, embedded, direction)
    except NotPackable as reason:
        return str(reason)
    except (TypeError, ValueError) as error:
        return f"it cannot be switched to packed attention ({str(error).splitlines()[0]})"
    if leak[: len(LONG)].any():
        return "its attention mask does not keep packed sequences apart"
    if not ((logits.detach() - alone).square().mean(-1).sqrt() <= CLOSE * alone.std()).all():
        return "its logits change when sequences are packed"
    parts = zip(apart, direction.split([len(LONG), len(SHORT)]), strict=True)
    slope_alone = torch.cat([_slope(*each, part) for each, part in parts])
    if not ((slope - slope_alone).norm(dim=-1) <= STEEP * slope_alone.norm(dim=-1)).all():
        return "its gradients change when sequences are packed"
    return None


def _slope(logits: Tensor, embedded: Tensor, direction: Tensor, *, keep: bool = False) -> Tensor:
    """The gradient of the logits along a direction to the embeddings, [N, D]."""
    (gradient,) = torch.autograd.grad(logits, embedded, direction, retain_graph=keep)
    return gradient[0].float()


def _logits(model: PreTrainedModel, sequences: list[list[int]], *, alone: bool = False) -> tuple[Tensor, Tensor]:
    """(logits of the row, its embeddings, which take gradients)."""
    ids = torch.tensor([[token for sequence in sequences for token in sequence]], device=model.device)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    extra = {} if alone else packing_inputs([len(sequence) for sequence in sequences], model.device)
    output = model(inputs_embeds=embedded, use_cache=False, **extra)
    return output.logits[0].float(), embedded
