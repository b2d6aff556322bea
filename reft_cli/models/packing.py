"""Whether a model can be trained on packed sequences exactly; found by trying it, since it depends on each family."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reft_cli.models.attention import NotPackable, attending

LONG, SHORT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [16, 17, 18, 19]
CLOSE = 0.05  # of the logits' spread, in the mean over a token's logits: above what bfloat16 rounds away


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

    Two sequences are packed: each one's logits must be those it has alone, and the second one's must have no gradient
    to the first.
    """
    try:
        with attending(model):
            logits, embedded = _logits(model, [LONG, SHORT])
            second = logits[len(LONG) :]
            (leak,) = torch.autograd.grad(second.square().sum(), embedded)
    except NotPackable as reason:
        return str(reason)
    except (TypeError, ValueError) as error:
        return f"it cannot be switched to packed attention ({str(error).splitlines()[0]})"
    if leak[0, : len(LONG)].any():
        return "its attention mask does not keep packed sequences apart"
    alone = torch.cat([_logits(model, [sequence], alone=True)[0] for sequence in (LONG, SHORT)]).detach()
    apart = (logits.detach() - alone).square().mean(-1).sqrt()  # [N]
    if apart.max() > CLOSE * alone.std():
        return "its logits change when sequences are packed"
    return None


def _logits(model: PreTrainedModel, sequences: list[list[int]], *, alone: bool = False) -> tuple[Tensor, Tensor]:
    """(logits of the row, its embeddings, which take gradients)."""
    ids = torch.tensor([[token for sequence in sequences for token in sequence]], device=model.device)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    extra = {} if alone else packing_inputs([len(sequence) for sequence in sequences], model.device)
    output = model(inputs_embeds=embedded, use_cache=False, **extra)
    return output.logits[0].float(), embedded
