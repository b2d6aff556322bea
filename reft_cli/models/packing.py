"""Whether a model can be trained on packed sequences exactly; found by trying it, since it depends on each family."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reft_cli.models.attention import SHARED_HEAD, NotPackable, attending, why_no_shared_head
from reft_cli.models.blocks import find_blocks
from reft_cli.models.placement import entry_device

HEAD = [20, 21, 22, 23, 24, 25, 26, 27, 28]  # of two sequences that share it
LONG, SHORT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [16, 17, 18, 19]
NOISE = 4.0  # times the difference that padding makes, which is rounding
CLOSE = 0.05  # of the logits' spread, in the mean over a token's logits: above what bfloat16 rounds away
STEEP = 0.25  # of a token's gradient: the same, through a whole model and back


def packing_inputs(
    lengths: list[int], device: torch.device | None = None, *, head: int | None = None
) -> dict[str, Tensor | int]:
    """What a packed row carries besides its ids: positions that restart, and the sequences' boundaries.

    `head`: so many tokens stand before the sequences and begin every one of them; there may be none this time.
    """
    before = [] if head is None else [head]
    bounds = torch.tensor([0, *before, *lengths]).cumsum(0).to(torch.int32)
    ways = [*(range(each) for each in before), *(range(head or 0, (head or 0) + length) for length in lengths)]
    positions = torch.cat([torch.arange(way.start, way.stop) for way in ways])[None]  # [1, N]
    longest = max([*before, *lengths])
    extra: dict[str, Tensor | int] = {} if head is None else {SHARED_HEAD: head}
    return extra | {
        "position_ids": positions.to(device),
        "cu_seq_lens_q": bounds.to(device),
        "cu_seq_lens_k": bounds.to(device),
        "max_length_q": longest,
        "max_length_k": longest,
    }


def why_not_packed(model: PreTrainedModel) -> str | None:
    """None if packed training equals padded training, else the reason.

    Two sequences are packed, on the device and in the type that will train: each one's logits and their gradient must
    be those it has alone, and the second one's logits must have no gradient to the first. A deep model in half
    precision gives other numbers whenever other kernels run, so what padding changes is measured too.
    """
    longest = _masked(model)
    if longest is not None:
        return f"its attention has a mask of its own, of {longest:,} tokens, and a packed row has more"
    return _why_not(model, [], how="when sequences are packed")


def _masked(model: PreTrainedModel) -> int | None:
    """Tokens of a square mask that the blocks hold, as GPT-Neo's do; what is tried here is shorter than that."""
    held = (buffer for block in find_blocks(model).modules for buffer in block.buffers())
    masks = (each for each in held if each.dtype == torch.bool and each.ndim > 1 and each.shape[-1] == each.shape[-2])
    return next((each.shape[-1] for each in masks if each.shape[-1] > 1), None)


def why_not_shared(model: PreTrainedModel) -> str | None:
    """None if packed sequences may share the head that they begin with, else the reason; tried in the same way."""
    return why_no_shared_head(model) or _why_not(model, HEAD, how="when sequences share their head")


def _why_not(model: PreTrainedModel, head: list[int], *, how: str) -> str | None:
    """Alone and padded are two whole sequences; packed are the first one and what comes after the head of the second.

    So the gradient to the head is the sum of both, and rows of those alone are `folded` to rows of the packed ones.
    """
    first, second = head + LONG, head + SHORT
    folded = torch.tensor([*range(len(first)), *range(len(head)), *range(len(first), len(first) + len(SHORT))])
    kept = torch.tensor([*range(len(first)), *range(len(first) + len(head), len(folded))])
    apart = [_Pass(model, [each], None) for each in (first, second)]
    alone = torch.cat([each.logits for each in apart])
    direction = torch.zeros_like(alone).index_copy(0, kept.to(alone.device), alone[kept])
    direction = direction / direction.norm()  # what is differentiated; of a size that float16 can hold
    parts = zip(apart, direction.split([len(first), len(second)]), strict=True)
    slope = torch.cat([each.slope(part) for each, part in parts])
    try:
        with attending(model):
            packed = _Pass(model, [first, SHORT], "packed", head=len(head))
            later = direction[kept]
            later[: len(first)] = 0
            leak, packed_slope = packed.slope(later), packed.slope(direction[kept])
    except NotPackable as reason:
        return str(reason)
    except (TypeError, ValueError) as error:
        return f"it cannot be switched to packed attention ({str(error).splitlines()[0]})"
    if leak[len(head) : len(first)].any():
        return "its attention mask does not keep packed sequences apart"
    padded, size = _Pass(model, [first, second], "padded"), alone.norm(dim=-1).mean()
    if _change(packed.logits, alone[kept], size) > max(CLOSE, NOISE * _change(padded.logits, alone, size)):
        return f"its logits change {how}"
    wanted, rounded = (
        torch.zeros_like(packed_slope).index_add(0, folded.to(each.device), each)
        for each in (slope, padded.slope(direction))
    )
    lengths = wanted.norm(dim=-1)
    if _change(packed_slope, wanted, lengths) > max(STEEP, NOISE * _change(rounded, wanted, lengths)):
        return f"its gradients change {how}"
    return None


def _change(found: Tensor, expected: Tensor, scale: Tensor) -> float:
    """The largest distance of a token's numbers from what they should be, in units of `scale`; NaN counts as far."""
    return float(((found - expected).norm(dim=-1) / scale).nan_to_num(torch.inf).max())


class _Pass:
    """One forward pass: the logits [N, V] of the real tokens, and gradients to their embeddings."""

    def __init__(
        self, model: PreTrainedModel, sequences: list[list[int]], layout: str | None, *, head: int = 0
    ) -> None:
        lengths, device = [len(sequence) for sequence in sequences], entry_device(model)
        extra: dict[str, Tensor | int] = {}
        if layout == "padded":
            tokens = torch.zeros(len(sequences), max(lengths), dtype=torch.long)
            for row, sequence in zip(tokens, sequences, strict=True):
                row[: len(sequence)] = torch.tensor(sequence)
            extra = {"attention_mask": (tokens > 0).long().to(device)}
        else:
            tokens = torch.tensor([[token for sequence in sequences for token in sequence]])
            if layout == "packed":
                rests = [lengths[0] - head, *lengths[1:]]
                extra = packing_inputs(rests, device, head=head or None)
        self.real = tokens.flatten().nonzero().squeeze(-1).to(device)
        self.embedded = model.get_input_embeddings()(tokens.to(device)).detach().requires_grad_(True)
        self._logits = model(inputs_embeds=self.embedded, use_cache=False, **extra).logits.flatten(0, 1)[self.real]
        self.logits = self._logits.detach().float()

    def slope(self, direction: Tensor) -> Tensor:
        """The gradient [N, D] of the logits along a direction."""
        upstream = direction.to(self._logits.dtype)
        (gradient,) = torch.autograd.grad(self._logits, self.embedded, upstream, retain_graph=True)
        return gradient.flatten(0, 1)[self.real].float()
