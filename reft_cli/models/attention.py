"""Attention over packed sequences: each attends within itself, without a mask of the whole row.

Registered with transformers under one name; a model is switched to it for packed batches and back afterwards. On a GPU
in half precision it is kernels of our own where a trial shows that they run and are right, else torch's variable-length
flash attention; elsewhere it is scaled-dot-product attention on the sequences of one length at a time. Boundaries come
with the batch, as `cu_seq_lens_q`, which transformers hands through. So does `shared_head`: where it is above zero, the
first sequence is the head of all others, each of which attends to it and then to itself, as if it stood before each.
A head that was read before is given by its keys and values instead.

Shapes: N tokens of all sequences, P of a beginning that they share, L of one, S of what one sees, H heads, K key-value
heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from reft_cli.models.kernel_attention import attend_by_kernels, why_not_kernels

PACKED = "reft_packed"
SHARED_HEAD = "shared_head"  # the input that says how long a head may be; how long it is, the first bounds say
FLASH_TYPES = (torch.bfloat16, torch.float16)
FLASH_WIDEST_HEAD = 256
SHARES_HEADS = "enable_gqa" in signature(varlen_attn).parameters  # since torch 2.12; before, it was always so

_heads_by_kernels: set[int] = set()  # sizes of heads that our kernels attend with, inside `attending`


class NotPackable(ValueError):
    """The model's attention does something that packed attention does not do."""


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, N, E]
    key: Tensor,  # [1, K, N, E]
    value: Tensor,  # [1, K, N, E]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    shared_head: int = 0,
    known_head: Sequence[Tensor] | None = None,  # keys and values [1, K, P, E] of one that was read before
    **_: object,  # transformers hands every attention function whatever the model was called with
) -> tuple[Tensor, None]:
    """softmax(q kᵀ · scaling) v within each sequence, causal: [1, N, H, E]. NotPackable: it would not be exact."""
    unknown = {"softcap": softcap, "s_aux": s_aux, "position_bias": position_bias, "attention_mask": attention_mask}
    given = [name for name, found in unknown.items() if found is not None]
    if given or dropout:
        raise NotPackable(f"its attention uses {given[0] if given else 'dropout'}")
    if cu_seq_lens_q is None or max_length_q is None:
        raise NotPackable("it does not hand sequence boundaries to its attention")
    if not getattr(module, "is_causal", True):
        raise NotPackable("its attention is not causal")
    if query.is_cuda and query.dtype in FLASH_TYPES and query.shape[-1] <= FLASH_WIDEST_HEAD:
        if known_head:
            return _after(known_head, query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
        return _flash(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window, shared_head), None
    bounds = cu_seq_lens_q.tolist()
    return _by_length(query, key, value, bounds, scaling, sliding_window, shared_head > 0, known_head), None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float | None, window: int | None,
    head: int,
) -> Tensor:  # fmt: skip
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [N, H or K, E]
    if query.shape[-1] in _heads_by_kernels:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend_by_kernels(q, k, v, bounds, longest=longest, scaling=scaling, window=window, head=head)[None]
    if head:
        raise NotPackable("torch's attention knows no head that sequences share")
    grouped, left = query.shape[1] != key.shape[1], -1 if window is None else window - 1
    attend: Callable[..., object] = partial(varlen_attn, enable_gqa=grouped) if SHARES_HEADS else varlen_attn
    attended = attend(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(left, 0))
    assert isinstance(attended, Tensor)
    return attended[None]


def _after(
    known: Sequence[Tensor], query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int,
    scaling: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    """Sequences that go on from a known head: it stands before them as one that they share, and asks for nothing."""
    tokens = known[0].shape[2]
    asking = torch.cat([query.new_zeros(1, query.shape[1], tokens, query.shape[3]), query], 2)
    keys, values = (torch.cat(each, 2) for each in zip(known, (key, value), strict=True))
    moved = torch.cat([bounds.new_zeros(1), bounds + tokens])
    return _flash(asking, keys, values, moved, max(longest, tokens), scaling, window, tokens)[:, tokens:]


def _by_length(
    query: Tensor, key: Tensor, value: Tensor, bounds: list[int], scaling: float | None, window: int | None,
    headed: bool = False, known: Sequence[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """One call for each run of neighbouring sequences of one length; batches are sorted by length."""
    lengths = [end - start for start, end in pairwise(bounds)]
    first = lengths.pop(0) if headed else 0
    runs = [(length, len(list(run))) for length, run in groupby(filter(None, lengths))]
    spans = [first, *(length * count for length, count in runs)]
    # split, not slices: its backward pass is one concatenation, where each slice would fill a whole row with zeros
    (asking, *before), *others = zip(*(each.split(spans, dim=2) for each in (query, key, value)), strict=True)
    known = before if first else known
    parts = [_attended(asking, before[0], before[1], scaling, window)] if first else []
    for (length, count), tensors in zip(runs, others, strict=True):
        # [count, H or K, L, E], keys and values after a head [count, K, S, E]
        q, *own = (each[0].unflatten(1, (count, length)).transpose(0, 1) for each in tensors)
        if known is not None:
            own = [torch.cat([head.expand(count, -1, -1, -1), rest], 2) for head, rest in zip(known, own, strict=True)]
        parts.append(_attended(q, own[0], own[1], scaling, window))
    return torch.cat(parts)[None]


def _attended(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """[B * L, H, E] of q [B, H, L, E], k and v [B, K, S, E]; the queries are those of the last of S tokens."""
    length, seen = q.shape[2], k.shape[2]
    banded = length < seen or (window is not None and window < seen)
    attended = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=_band(length, seen, window, q.device) if banded else None,
        is_causal=not banded,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return attended.transpose(1, 2).flatten(0, 1)


def _band(length: int, seen: int, window: int | None, device: torch.device) -> Tensor:
    ones = torch.ones(length, seen, dtype=torch.bool, device=device)
    return ones.tril(seen - length) & ones.triu(seen - length + 1 - (window or seen))


AttentionInterface.register(PACKED, packed_attention)  # and no mask function: transformers then makes no mask


@contextmanager
def attending(model: PreTrainedModel, implementation: str = PACKED, *, kernels: bool | None = None) -> Iterator[None]:
    """Inside, the model attends in this way; by default within packed sequences, whose batches carry their bounds.

    `kernels`: by ours where they can; None: in packed attention alone.
    """
    before, heads_before = model.config._attn_implementation, set(_heads_by_kernels)
    wanted = implementation == PACKED if kernels is None else kernels
    _let_kernels_attend(_heads_of(model) if wanted else set())
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _let_kernels_attend(heads_before)


def _let_kernels_attend(sizes: set[int]) -> None:
    _heads_by_kernels.clear()
    _heads_by_kernels.update(sizes)


def why_no_shared_head(model: PreTrainedModel) -> str | None:
    """None if packed sequences can share a head on the model's device and in its type, else the reason; tried."""
    shape = _shape_of_heads(model)
    if model.device.type != "cuda" or model.dtype not in FLASH_TYPES or (shape and shape[0] > FLASH_WIDEST_HEAD):
        return None
    if shape is None:
        return "its blocks have heads of different numbers"
    reason = why_not_kernels(model.device, *shape) or why_not_kernels(model.device, *shape, True)
    return None if reason is None else f"our attention kernels are not used: {reason}"


def _heads_of(model: PreTrainedModel) -> set[int]:
    """Its size of heads if our kernels take it; tried before the model runs, which may be compiled or recorded then."""
    shape = _shape_of_heads(model)
    return {shape[0]} if shape is not None and why_not_kernels(model.device, *shape) is None else set()


def _shape_of_heads(model: PreTrainedModel) -> tuple[int, int] | None:
    """Size of a head, and how many have keys and values in common; None where blocks differ in that."""
    config = model.config.get_text_config()
    heads, shared = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if not isinstance(heads, int) or not isinstance(shared, int | None):  # some have a list, a number for each block
        return None
    return getattr(config, "head_dim", None) or config.hidden_size // heads, heads // (shared or heads)
