"""Causal attention within packed sequences as GPU kernels, for many short sequences and few key-value heads.

Kernels made for long sequences add up the gradient to the queries in float32 with atomic additions, and make a gradient
to keys and values for every query head, to be summed later. With sequences of a few hundred tokens, filling and reading
those buffers takes longer than the arithmetic. Here a second pass computes the scores again instead: one kernel goes
along the keys of a block of queries, one along the queries of a block of keys, through all heads that share it. What is
written is the result, once, and always summed in the same order: every run gives the same bits. A block of queries is
that of a few tokens in all heads that share keys, not of many tokens in one, so that little of a block lies beyond the
end of a sequence or before what it may see.

Where the first sequence is the head of all others, its tokens come before the own ones of each: queries and keys are
counted from the beginning of the head, whose keys stand in the first sequence. The gradient to them is a sum over all
sequences, whose parts are written side by side and then added up.

Written in Triton, which torch brings along on GPUs; imported only where there is one.

Shapes: N tokens of all sequences, B sequences, H query heads, K key-value heads, E head size. Scores are kept as powers
of two: with t = scaling · log₂ e a weight is 2^(t q·k − mass), and `mass` [H, N] is log₂ Σ 2^(t q·k).
"""

from __future__ import annotations

from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_TOGETHER = 8  # heads in a block of queries
# rows of queries and columns of keys in a block, measured on an H200 at 40 to 800 tokens a sequence
FORWARD = {"ROWS": 64, "COLS": 32, "num_warps": 4, "num_stages": 3}
QUERIES = {"ROWS": 64, "COLS": 64, "num_warps": 4, "num_stages": 2}
KEYS = {"ROWS": 32, "COLS": 64, "num_warps": 4, "num_stages": 3}
TOGETHER = {"COLS": 1, "num_warps": 1}  # keys whose parts are added up, heads of 64 and 128 numbers, 32 sequences


def forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor,
    *, longest: int, scaling: float, window: int | None, head: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What is attended [N, H, E] and mass [H, N]; query [N, H, E], key and value [N, K, E], bounds [B + 1].

    `head` above zero: the first sequence, of no more tokens than that, is the head of all others.
    """
    tokens, heads, size = query.shape
    attended = query.new_empty(query.shape)
    mass = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
    together = _together(heads // key.shape[1])
    with torch.cuda.device_of(query):
        _forward[_grid(longest, FORWARD["ROWS"] // together, bounds, heads // together)](
            query, key, value, attended, mass, bounds, scaling * log2(e), tokens, window or 0,
            *_strides(query, key, value, attended),
            SHARING=heads // key.shape[1], HEADS=together, SIZE=size, BANDED=window is not None, HEADED=head > 0,
            **FORWARD,
        )  # fmt: skip
    return attended, mass


def backward(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, mass: Tensor, bounds: Tensor,
    *, longest: int, scaling: float, window: int | None, head: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to query [N, H, E], key and value [N, K, E] from that to what was attended."""
    (tokens, heads, size), shared = query.shape, key.shape[1]
    to_query, to_key, to_value = (each.new_empty(each.shape) for each in (query, key, value))
    together = _together(heads // shared)
    common = {"SHARING": heads // shared, "HEADS": together, "SIZE": size, "BANDED": window is not None}
    common |= {"HEADED": head > 0}
    numbers = (bounds, scaling, scaling * log2(e), tokens, window or 0)
    along = torch.empty_like(mass)
    parts = mass.new_empty(2, len(bounds) - 1, head, shared, size) if head else (mass, mass)  # not touched
    with torch.cuda.device_of(query):
        _to_queries[_grid(longest, QUERIES["ROWS"] // together, bounds, heads // together)](
            query, key, value, attended, upstream, mass, along, to_query, *numbers,
            *_strides(query, key, value, attended, upstream, to_query), **common, **QUERIES,
        )  # fmt: skip
        _to_keys[_grid(head + longest, KEYS["COLS"], bounds, shared)](
            query, key, value, upstream, mass, along, to_key, to_value, *parts, *numbers, head,
            *_strides(query, key, value, upstream, to_key, to_value), **common, **KEYS,
        )  # fmt: skip
        if head:
            _add_parts[(shared, -(-head // TOGETHER["COLS"]))](
                *parts, to_key, to_value, bounds, len(bounds) - 1, head, *_strides(to_key, to_value),
                SIZE=size, **TOGETHER,
            )  # fmt: skip
    return to_query, to_key, to_value


def _grid(longest: int, block: int, bounds: Tensor, heads: int) -> tuple[int, int, int]:
    """Heads, which lie side by side, before sequences, and blocks last."""
    return heads, len(bounds) - 1, -(-longest // block)


def _together(sharing: int) -> int:
    """Heads in a block of queries: a power of two of those that share keys, so that a block has fewer tokens."""
    return min(sharing & -sharing, MOST_TOGETHER)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    assert all(each.stride(2) == 1 for each in tensors), "a head's numbers lie side by side"
    return tuple(each.stride(axis) for each in tensors for axis in (0, 1))


@triton.jit
def _load(start: tl.tensor, places: tl.tensor, there: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """A block [rows, E] of heads that begin at these places; zero where there is none."""
    return tl.load(start + places[:, None] + tl.arange(0, SIZE)[None, :], mask=there[:, None], other=0.0)


@triton.jit
def _store(start: tl.tensor, places: tl.tensor, there: tl.tensor, values: tl.tensor, SIZE: tl.constexpr) -> None:
    where = start + places[:, None] + tl.arange(0, SIZE)[None, :]
    tl.store(where, values.to(start.dtype.element_ty), mask=there[:, None])


@triton.jit
def _before(bounds: tl.tensor, start: tl.tensor, HEADED: tl.constexpr) -> tl.tensor:
    """How many tokens of the head come before a sequence; none before the head itself, which is the first."""
    tokens = start * 0
    if HEADED:
        tokens = tl.where(tl.program_id(1) > 0, tl.load(bounds + 1), tokens)
    return tokens


@triton.jit
def _places(numbers: tl.tensor, before: tl.tensor, start: tl.tensor, HEADED: tl.constexpr) -> tl.tensor:
    """Where the tokens stand that have these numbers in a sequence, those of its head among them."""
    places = start - before + numbers
    if HEADED:
        places = tl.where(numbers < before, numbers, places)
    return places.to(tl.int64)


@triton.jit
def _sees(rows: tl.tensor, cols: tl.tensor, window: tl.tensor, BANDED: tl.constexpr) -> tl.tensor:
    """Whether the query at a place attends to the key at another: it comes no earlier, and is not too far on."""
    seen = rows >= cols
    if BANDED:
        seen = seen & (rows - cols < window)
    return seen


@triton.jit
def _lowest(first: tl.tensor, window: tl.tensor, COLS: tl.constexpr, BANDED: tl.constexpr) -> tl.tensor:
    """The first key that a block of queries sees, rounded down to blocks."""
    low = first * 0
    if BANDED:
        low = tl.maximum(first - window + 1, 0) // COLS * COLS
    return low


@triton.jit(do_not_specialize=["total", "window"])
def _forward(
    q_at: tl.tensor, k_at: tl.tensor, v_at: tl.tensor, o_at: tl.tensor, mass_at: tl.tensor, bounds: tl.tensor,
    t: tl.tensor, total: tl.tensor, window: tl.tensor, qn: tl.tensor, qh: tl.tensor, kn: tl.tensor, kh: tl.tensor,
    vn: tl.tensor, vh: tl.tensor, on: tl.tensor, oh: tl.tensor,
    SHARING: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, BANDED: tl.constexpr, HEADED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """Some queries of HEADS heads that share keys, along the keys that they see."""
    start = tl.load(bounds + tl.program_id(1))
    length = tl.load(bounds + tl.program_id(1) + 1) - start
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * (ROWS // HEADS)  # long ways first
    if first >= length:
        return
    before = _before(bounds, start, HEADED)
    first, end = before + first, before + length
    rows = first + tl.arange(0, ROWS) // HEADS
    heads = tl.program_id(0) * HEADS + tl.arange(0, ROWS) % HEADS
    shared = tl.program_id(0) * HEADS // SHARING
    there, tokens = rows < end, (start - before + rows).to(tl.int64)
    q = _load(q_at, tokens * qn + heads * qh, there, SIZE)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    summed = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, SIZE], tl.float32)
    for begin in range(_lowest(first, window, COLS, BANDED), tl.minimum(first + ROWS // HEADS, end), COLS):
        cols = begin + tl.arange(0, COLS)
        inside, keys = cols < end, _places(cols, before, start, HEADED)
        k = _load(k_at + shared * kh, keys * kn, inside, SIZE)
        v = _load(v_at + shared * vh, keys * vn, inside, SIZE)
        seen = _sees(rows[:, None], cols[None, :], window, BANDED)
        scores = tl.where(seen, tl.dot(q, tl.trans(k)) * t, float("-inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        safe = tl.where(better == float("-inf"), 0.0, better)  # a block of keys may lie before all that a row sees
        weights = tl.exp2(scores - safe[:, None])
        shrunk = tl.exp2(best - safe)
        summed = summed * shrunk + tl.sum(weights, 1)
        o = tl.dot(weights.to(v.dtype), v, o * shrunk[:, None])
        best = better
    _store(o_at, tokens * on + heads * oh, there, o / summed[:, None], SIZE)
    tl.store(mass_at + heads.to(tl.int64) * total + tokens, best + tl.log2(summed), mask=there)


@triton.jit(do_not_specialize=["total", "window"])
def _to_queries(
    q_at: tl.tensor, k_at: tl.tensor, v_at: tl.tensor, o_at: tl.tensor, do_at: tl.tensor, mass_at: tl.tensor,
    along_at: tl.tensor, dq_at: tl.tensor, bounds: tl.tensor, scaling: tl.tensor, t: tl.tensor, total: tl.tensor,
    window: tl.tensor, qn: tl.tensor, qh: tl.tensor, kn: tl.tensor, kh: tl.tensor, vn: tl.tensor, vh: tl.tensor,
    on: tl.tensor, oh: tl.tensor, don: tl.tensor, doh: tl.tensor, dqn: tl.tensor, dqh: tl.tensor,
    SHARING: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, BANDED: tl.constexpr, HEADED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient to some queries of HEADS heads; and do·o of each, which the gradient to keys needs too."""
    start = tl.load(bounds + tl.program_id(1))
    length = tl.load(bounds + tl.program_id(1) + 1) - start
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * (ROWS // HEADS)  # long ways first
    if first >= length:
        return
    before = _before(bounds, start, HEADED)
    first, end = before + first, before + length
    rows = first + tl.arange(0, ROWS) // HEADS
    heads = tl.program_id(0) * HEADS + tl.arange(0, ROWS) % HEADS
    shared = tl.program_id(0) * HEADS // SHARING
    there, tokens = rows < end, (start - before + rows).to(tl.int64)
    q = _load(q_at, tokens * qn + heads * qh, there, SIZE)
    o = _load(o_at, tokens * on + heads * oh, there, SIZE)
    do = _load(do_at, tokens * don + heads * doh, there, SIZE)
    numbers = heads.to(tl.int64) * total + tokens
    mass = tl.load(mass_at + numbers, mask=there, other=0.0)
    along = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(along_at + numbers, along, mask=there)
    dq = tl.zeros([ROWS, SIZE], tl.float32)
    for begin in range(_lowest(first, window, COLS, BANDED), tl.minimum(first + ROWS // HEADS, end), COLS):
        cols = begin + tl.arange(0, COLS)
        inside, keys = cols < end, _places(cols, before, start, HEADED)
        k = _load(k_at + shared * kh, keys * kn, inside, SIZE)
        v = _load(v_at + shared * vh, keys * vn, inside, SIZE)
        seen = _sees(rows[:, None], cols[None, :], window, BANDED)
        weights = tl.where(seen, tl.exp2(tl.dot(q, tl.trans(k)) * t - mass[:, None]), 0.0)
        slopes = weights * (tl.dot(do, tl.trans(v)) - along[:, None])
        dq = tl.dot(slopes.to(k.dtype), k, dq)
    _store(dq_at, tokens * dqn + heads * dqh, there, dq * scaling, SIZE)


@triton.jit(do_not_specialize=["total", "window", "room"])
def _to_keys(
    q_at: tl.tensor, k_at: tl.tensor, v_at: tl.tensor, do_at: tl.tensor, mass_at: tl.tensor, along_at: tl.tensor,
    dk_at: tl.tensor, dv_at: tl.tensor, dk_parts: tl.tensor, dv_parts: tl.tensor, bounds: tl.tensor,
    scaling: tl.tensor, t: tl.tensor, total: tl.tensor, window: tl.tensor, room: tl.tensor,
    qn: tl.tensor, qh: tl.tensor, kn: tl.tensor, kh: tl.tensor, vn: tl.tensor, vh: tl.tensor,
    don: tl.tensor, doh: tl.tensor, dkn: tl.tensor, dkh: tl.tensor, dvn: tl.tensor, dvh: tl.tensor,
    SHARING: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, BANDED: tl.constexpr, HEADED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """The gradients to one block of keys and values, along all queries that see them, of all heads that share them."""
    shared = tl.program_id(0)
    start = tl.load(bounds + tl.program_id(1))
    length = tl.load(bounds + tl.program_id(1) + 1) - start
    before = _before(bounds, start, HEADED)
    first, end = tl.program_id(2) * COLS, before + length
    if (first >= end) | (length == 0):
        return
    cols = first + tl.arange(0, COLS)
    there, tokens = cols < end, _places(cols, before, start, HEADED)
    k = _load(k_at + shared * kh, tokens * kn, there, SIZE)
    v = _load(v_at + shared * vh, tokens * vn, there, SIZE)
    dk = tl.zeros([COLS, SIZE], tl.float32)
    dv = tl.zeros([COLS, SIZE], tl.float32)
    low, high = tl.maximum(first, before), end
    if BANDED:
        high = tl.maximum(tl.minimum(end, first + COLS + window - 1), low)
    blocks = tl.cdiv(high - low, ROWS // HEADS)
    for turn in range(0, SHARING // HEADS * blocks):
        heads = shared * SHARING + turn // blocks * HEADS + tl.arange(0, ROWS) % HEADS
        rows = low + turn % blocks * (ROWS // HEADS) + tl.arange(0, ROWS) // HEADS
        inside, queries = rows < end, (start - before + rows).to(tl.int64)
        q = _load(q_at, queries * qn + heads * qh, inside, SIZE)
        do = _load(do_at, queries * don + heads * doh, inside, SIZE)
        numbers = heads.to(tl.int64) * total + queries
        mass = tl.load(mass_at + numbers, mask=inside, other=0.0)
        along = tl.load(along_at + numbers, mask=inside, other=0.0)
        seen = _sees(rows[None, :], cols[:, None], window, BANDED) & inside[None, :]
        weights = tl.where(seen, tl.exp2(tl.dot(k, tl.trans(q)) * t - mass[None, :]), 0.0)
        dv = tl.dot(weights.to(do.dtype), do, dv)
        slopes = weights * (tl.dot(v, tl.trans(do)) - along[None, :])
        dk = tl.dot(slopes.to(q.dtype), q, dk)
    if HEADED:
        known = there & ((cols < before) | (tl.program_id(1) == 0))  # the head's, as this sequence sees it
        part = _parts(tl.program_id(1), cols, shared, room, SIZE)
        _store(dk_parts, part, known, dk * scaling, SIZE)
        _store(dv_parts, part, known, dv, SIZE)
        there = there & (cols >= before) & (tl.program_id(1) > 0)
    _store(dk_at + shared * dkh, tokens * dkn, there, dk * scaling, SIZE)
    _store(dv_at + shared * dvh, tokens * dvn, there, dv, SIZE)


@triton.jit
def _parts(
    sequence: tl.tensor, cols: tl.tensor, shared: tl.tensor, room: tl.tensor, SIZE: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Where parts [B, head, K, E] hold some keys of the head, as a sequence sees them."""
    return ((sequence.to(tl.int64) * room + cols) * tl.num_programs(0) + shared) * SIZE


@triton.jit(do_not_specialize=["sequences", "room"])
def _add_parts(
    dk_parts: tl.tensor, dv_parts: tl.tensor, dk_at: tl.tensor, dv_at: tl.tensor, bounds: tl.tensor,
    sequences: tl.tensor, room: tl.tensor, dkn: tl.tensor, dkh: tl.tensor, dvn: tl.tensor, dvh: tl.tensor,
    SIZE: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """The gradients to some keys and values of the head: what each sequence gives them, in the sequences' order."""
    shared = tl.program_id(0)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    there, tokens = cols < tl.load(bounds + 1), cols.to(tl.int64)
    dk = tl.zeros([COLS, SIZE], tl.float32)
    dv = tl.zeros([COLS, SIZE], tl.float32)
    for sequence in range(0, sequences):
        given = there & (tl.load(bounds + sequence + 1) > tl.load(bounds + sequence))
        part = _parts(tl.cast(sequence, tl.int32), cols, shared, room, SIZE)
        dk += _load(dk_parts, part, given, SIZE)
        dv += _load(dv_parts, part, given, SIZE)
    _store(dk_at + shared * dkh, tokens * dkn, there, dk, SIZE)
    _store(dv_at + shared * dvh, tokens * dvn, there, dv, SIZE)
