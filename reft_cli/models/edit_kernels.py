"""Triton kernels of the low-rank edit of some rows: two forward, three backward, each beside a copy of the rest.

    forward     x_n = h[rows_n]          z = x downᵀ + bias        h'[rows_n] = x_n + z_n up
    backward    g_n = upstream[rows_n]   w = g upᵀ                 below[rows_n] = g_n + w_n down
                to down: wᵀ x            to bias: Σ_n w_n          to up: zᵀ g

`_project` makes z, or w, in as many parts as the width has blocks, so that a few hundred rows keep a whole GPU busy;
`_expand` adds the parts up and writes the rows; `_outer` sums over the rows. Everything is computed in float32, without
TF32, and rounded once. Sums are taken in an order that depends on the shapes alone: the same input gives the same bits.
A row that is given twice is written twice with the same values, as index_copy would.

Shapes: M rows of h in all, N edited rows, D hidden size, r rank, P parts.
h, upstream [M, D] bfloat16, float16 or float32; rows [N] int64; down, up [r, D] and bias [r] float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_RANK = 128  # beyond it matrix products are the faster way
RANKS = 8  # that a program takes at a time
MANY = 2048  # rows; from here on they fill the GPU by themselves
SHARE = 1024  # of many rows, that one program of `_outer` sums up


class Blocks(NamedTuple):
    """What a program takes at a time: rows, columns, and the warps it has. Measured on an H200."""

    rows: int
    columns: int
    warps: int


def _blocks_through(count: int, width: int) -> Blocks:
    """Of `project` and `expand`: a row is in at most eight parts, which every program of `_expand` adds up."""
    return Blocks(8 if count >= MANY else 4, max(256, triton.next_power_of_2(triton.cdiv(width, 8))), 4)


def _blocks_outer(count: int) -> Blocks:
    """Of `_outer`."""
    return Blocks(16, 64, 4) if count >= MANY else Blocks(64, 16, 8)


@triton.jit(do_not_specialize=["count"])
def _project(
    h, rows, left, kept, parts, count, D: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr
):  # fmt: skip
    """kept[n] = h[rows[n]], parts[p, n, j] = Σ over the p-th columns d of h[rows[n], d] left[j, d]."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    there = n < count
    inside = there[:, None] & (d < D)[None, :]
    row = tl.load(rows + n, mask=there, other=0)
    x = tl.load(h + row[:, None] * D + d[None, :], mask=inside, other=0.0)
    tl.store(kept + n[:, None] * D + d[None, :], x, mask=inside)
    to = parts + (tl.program_id(1) * count.to(tl.int64) + n) * R
    wide = x.to(tl.float32)[:, None, :]
    for first in range(0, R, BR):
        j = first + tl.arange(0, BR)
        some = tl.load(left + j[:, None] * D + d[None, :], mask=(j < R)[:, None] & (d < D)[None, :], other=0.0)
        sums = tl.sum(wide * some[None, :, :], axis=2)
        tl.store(to[:, None] + j[None, :], sums, mask=there[:, None] & (j < R)[None, :])


@triton.jit(do_not_specialize=["count"])
def _expand(
    kept, rows, parts, bias, right, out, inner, count, D: tl.constexpr, R: tl.constexpr, BR: tl.constexpr,
    P: tl.constexpr, BP: tl.constexpr, BIAS: tl.constexpr, WRITE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """inner[n] = Σ_p parts[p, n] + bias, out[rows[n]] = kept[n] + inner[n] right."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    there = n < count
    inside = there[:, None] & (d < D)[None, :]
    row = tl.load(rows + n, mask=there, other=0)
    x = tl.load(kept + n[:, None] * D + d[None, :], mask=inside, other=0.0)
    part = tl.arange(0, BP).to(tl.int64)[:, None, None]
    delta = tl.zeros([BN, BD], tl.float32)
    for first in range(0, R, BR):
        j = first + tl.arange(0, BR)
        live, at = there[:, None] & (j < R)[None, :], n[:, None] * R + j[None, :]
        some_parts = tl.load(parts + part * count * R + at[None, :, :], mask=(part < P) & live[None, :, :], other=0.0)
        z = tl.sum(some_parts, axis=0)
        if BIAS:
            z += tl.load(bias + j, mask=j < R, other=0.0)[None, :]
        tl.store(inner + at, z, mask=live & (tl.program_id(1) == 0))
        some = tl.load(right + j[:, None] * D + d[None, :], mask=(j < R)[:, None] & (d < D)[None, :], other=0.0)
        delta += tl.sum(some[None, :, :] * z[:, :, None], axis=1)  # turned, Triton would make a TF32 product of it
    if WRITE:
        y = (x.to(tl.float32) + delta).to(out.dtype.element_ty)
        tl.store(out + row[:, None] * D + d[None, :], y, mask=inside)


@triton.jit
def _sum_outer(
    weights, x, to, to_bias, first, last, D: tl.constexpr, R: tl.constexpr, WANTED: tl.constexpr, BIAS: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """to[j, d] += Σ_n weights[n, j] x[n, d] and to_bias[j] += Σ_n weights[n, j], over first <= n < last."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    j = tl.program_id(1) * BR + tl.arange(0, BR)
    total = tl.zeros([BR, BN, BD], tl.float32)
    total_bias = tl.zeros([BR, BN], tl.float32)
    start = first
    while start < last:
        n = start + tl.arange(0, BN).to(tl.int64)
        w = tl.load(weights + n[None, :] * R + j[:, None], mask=(n < last)[None, :] & (j < R)[:, None], other=0.0)
        some = tl.load(x + n[:, None] * D + d[None, :], mask=(n < last)[:, None] & (d < D)[None, :], other=0.0)
        total += w[:, :, None] * some.to(tl.float32)[None, :, :]
        total_bias += w
        start += BN
    inside = (j < R)[:, None] & (d < D)[None, :]
    if WANTED:
        at = to + j[:, None] * D + d[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) + tl.sum(total, axis=1), mask=inside)
    if BIAS:
        mine = (j < R) & (tl.program_id(0) == 0)
        tl.store(to_bias + j, tl.load(to_bias + j, mask=mine, other=0.0) + tl.sum(total_bias, axis=1), mask=mine)


@triton.jit(do_not_specialize=["count", "share"])
def _outer(
    w, x, z, g, to_down, to_bias, to_up, count, share, D: tl.constexpr, R: tl.constexpr, DOWN: tl.constexpr,
    BIAS: tl.constexpr, UP: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """to_down[s] += wᵀ x, to_bias[s] += Σ_n w and to_up[s] += zᵀ g, over the s-th `share` rows."""
    split = tl.program_id(2) // 2
    first = split.to(tl.int64) * share
    last = tl.minimum(first + share, count)
    if tl.program_id(2) % 2 == 0:
        if DOWN or BIAS:
            at = to_down + split * R * D
            _sum_outer(w, x, at, to_bias + split * R, first, last, D, R, DOWN, BIAS, BR, BN, BD)
    else:
        if UP:
            _sum_outer(z, g, to_up + split * R * D, to_bias, first, last, D, R, True, False, BR, BN, BD)


def takes(h: Tensor, down: Tensor, bias: Tensor, up: Tensor) -> bool:
    """Whether the kernels are made for these."""
    wide = all(value.dtype == torch.float32 and value.is_contiguous() for value in (down, bias, up))
    return wide and h.is_cuda and h.dtype in DTYPES and down.shape[0] <= MOST_RANK


class EditRows(torch.autograd.Function):
    """h [..., D] with h + (h downᵀ + bias) up at its flat rows [N]; the rest is copied.

    Gradients to leaves that have a `.grad` are added to it here, which saves a tensor and an addition for each.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, rows: Tensor, down: Tensor, bias: Tensor, up: Tensor) -> Tensor:  # noqa: ANN401
        """Keeps the edited rows as they were and z, N (D + r) numbers."""
        flat = h.reshape(-1, h.shape[-1]).contiguous()  # [M, D]
        edited = flat.clone()
        before, z = _through(flat, rows, down, bias, up, edited)
        ctx.save_for_backward(rows, before, z, down, up)
        ctx.values = down, bias, up  # saved ones may come back as copies that know no .grad
        return edited.view(h.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """The upstream gradient belongs to whoever made it, so it is copied too."""
        rows, before, z, down, up = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        flat = upstream.reshape(-1, upstream.shape[-1]).contiguous()  # [M, D]
        below = flat.clone() if wanted[0] else None
        g, w = _through(flat, rows, up, None, down, below)
        to_values = _to_values(ctx.values, wanted[2:], w, before, z, g)
        return None if below is None else below.view(upstream.shape), None, *to_values


def _through(
    source: Tensor, rows: Tensor, left: Tensor, bias: Tensor | None, right: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows x [N, D] of source [M, D] and inner = x leftᵀ + bias [N, r]; out's rows become x + inner right."""
    (rank, width), count = left.shape, rows.numel()
    kept, inner = source.new_empty(count, width), left.new_empty(count, rank)
    if not count:
        return kept, inner
    block = _blocks_through(count, width)
    parts = triton.cdiv(width, block.columns)
    grid = (triton.cdiv(count, block.rows), parts)
    shape = {"D": width, "R": rank, "BR": _ranks(rank), "BN": block.rows, "BD": block.columns, "num_warps": block.warps}
    with torch.cuda.device_of(source):
        sums = left.new_empty(parts, count, rank)
        _project[grid](source, rows, left, kept, sums, count, **shape)
        _expand[grid](
            kept, rows, sums, sums if bias is None else bias, right, kept if out is None else out, inner, count,
            P=parts, BP=triton.next_power_of_2(parts), BIAS=bias is not None, WRITE=out is not None, **shape,
        )  # fmt: skip
    return kept, inner


def _to_values(
    values: Sequence[Tensor], wanted: Sequence[bool], w: Tensor, x: Tensor, z: Tensor, g: Tensor
) -> Sequence[Tensor | None]:
    """Gradients to down, bias and up, each where it is wanted; None where it was added to the `.grad` of a leaf."""
    if all(_has_room(value) for value, want in zip(values, wanted, strict=True) if want):
        _add_outer(w, x, z, g, to=[value.grad if want else None for value, want in zip(values, wanted, strict=True)])
        return None, None, None
    to = [torch.zeros_like(value) if want else None for value, want in zip(values, wanted, strict=True)]
    _add_outer(w, x, z, g, to=to)
    return to


def _has_room(value: Tensor) -> bool:
    return value.is_leaf and value.grad is not None and value.grad.is_contiguous()


def _add_outer(w: Tensor, x: Tensor, z: Tensor, g: Tensor, *, to: Sequence[Tensor | None]) -> None:
    """Add wᵀ x [r, D], Σ_n w [r] and zᵀ g [r, D] to what is there; None is not wanted."""
    (count, rank), width = w.shape, x.shape[1]
    wanted = [each for each in to if each is not None]
    if not count or not wanted:
        return
    block, splits = _blocks_outer(count), triton.cdiv(count, SHARE) if count >= MANY else 1
    parts = [each.new_zeros(splits, *each.shape) for each in wanted] if splits > 1 else wanted
    left = iter(parts)
    down, bias, up = (w if each is None else next(left) for each in to)
    grid = (triton.cdiv(width, block.columns), triton.cdiv(rank, _ranks(rank)), 2 * splits)
    with torch.cuda.device_of(x):
        _outer[grid](
            w, x, z, g, down, bias, up, count, triton.cdiv(count, splits), D=width, R=rank, DOWN=to[0] is not None,
            BIAS=to[1] is not None, UP=to[2] is not None, BR=_ranks(rank), BN=block.rows, BD=block.columns,
            num_warps=block.warps,
        )  # fmt: skip
    if splits > 1:
        for each, part in zip(wanted, parts, strict=True):
            each += part.sum(0)


def _ranks(rank: int) -> int:
    return min(RANKS, triton.next_power_of_2(rank))
