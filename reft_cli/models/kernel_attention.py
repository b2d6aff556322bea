"""Our attention kernels as an operator that autograd, torch.compile and CUDA graphs know, and whether they run here.

Shapes: N tokens of all sequences, B sequences, H query heads, K key-value heads, E head size.
"""

from __future__ import annotations

import subprocess
import warnings
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

HEAD_SIZES = (16, 32, 64, 128)  # blocks of queries, keys and values fit a multiprocessor, each a power of two wide
OLDEST = (8, 0)  # compute capability, for bfloat16
CLOSE = 0.02  # relative error of a trial; bfloat16 rounds at 0.004
TRIAL = (0, 3, 70, 64, 131, 0, 9)  # lengths of its sequences: none, within one block, a block exactly, over more
HEAD = 43  # that they share in another trial


def attend_by_kernels(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor,
    *, longest: int, scaling: float, window: int | None, head: int = 0,
) -> Tensor:  # fmt: skip
    """softmax(q kᵀ · scaling) v within each sequence, causal: [N, H, E] of query [N, H, E], key and value [N, K, E].

    `bounds` [B + 1] int32 on the device; `longest` is no shorter than any sequence; a `window` is what a query sees,
    itself included. With a `head` above zero the first sequence, of no more tokens than that, stands before each other
    one too, and a window reaches into it. The same bits in every run, forward and backward.
    """
    attended: Tensor
    attended, _ = torch.ops.reft.attend_packed(query, key, value, bounds, longest, scaling, window, head)
    return attended


@cache
def why_not_kernels(device: torch.device, head_size: int, sharing: int, headed: bool = False) -> str | None:
    """None if the kernels attend on the device as plain arithmetic does, tried forward and backward; else the reason.

    `sharing` heads have keys and values in common; `headed`: so do sequences, those of their first tokens. Where
    kernels ought to run and do not, a warning says so.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return "they are written for NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return "the GPU is too old"
    if head_size not in HEAD_SIZES:
        return f"a head of {head_size} numbers is none of {', '.join(map(str, HEAD_SIZES))}"
    if find_spec("triton") is None:
        return "Triton is not installed"
    reason = _why_trial_fails(device, head_size, sharing, HEAD if headed else 0)
    if reason is not None:
        done = "rows do not share a head" if headed else "torch's attention is used in place of our kernels"
        warnings.warn(f"{done}: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def _why_trial_fails(device: torch.device, head_size: int, sharing: int, head: int) -> str | None:
    from triton import TritonError

    try:
        with torch.inference_mode(False), torch.enable_grad():
            error = _error_of_trial(device, head_size, sharing, head)
    except torch.OutOfMemoryError:
        raise
    except (TritonError, RuntimeError, OSError, subprocess.CalledProcessError) as refusal:
        return f"they do not run here ({(str(refusal).strip() or repr(refusal)).splitlines()[0]})"
    return None if error < CLOSE else f"they are off by {error:.3f} of what plain arithmetic gives"


def _error_of_trial(device: torch.device, head_size: int, sharing: int, head: int = 0) -> float:
    """The largest relative error of what is attended and of its gradients, beside float32 one sequence at a time."""
    chance = torch.Generator(device).manual_seed(0)
    bounds = torch.tensor([0, head, *TRIAL], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    sizes = [(heads, head_size) for heads in (2 * sharing, 2, 2, 2 * sharing)]
    query, key, value, upstream = (
        torch.randn(int(bounds[-1]), *size, device=device, generator=chance).bfloat16().requires_grad_()
        for size in sizes
    )
    leaves, scaling = (query, key, value), head_size**-0.5
    ours = attend_by_kernels(*leaves, bounds.to(device), longest=max(TRIAL), scaling=scaling, window=None, head=head)
    plain = torch.cat([_plain(*leaves, start, end, head) for start, end in pairwise(bounds.tolist())])
    found = (ours.detach(), *torch.autograd.grad(ours, leaves, upstream))
    wanted = (plain.detach(), *torch.autograd.grad(plain, leaves, upstream.float()))
    errors = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(found, wanted, strict=True)]
    return float(torch.stack(errors).max())  # NaN if one is


def _plain(query: Tensor, key: Tensor, value: Tensor, start: int, end: int, head: int) -> Tensor:
    """One sequence [L, H, E], every score written out."""
    places = torch.tensor([*range(min(head, start)), *range(start, end)], dtype=torch.long, device=query.device)
    q, k, v = (each[places].float().transpose(0, 1) for each in (query, key, value))  # [H or K, S, E]
    q = q.unflatten(0, (len(k), -1))  # [K, H / K, S, E]
    scores = q @ k[:, None].mT * q.shape[-1] ** -0.5
    later = torch.ones(len(places), len(places), dtype=torch.bool, device=q.device).triu(1)
    whole = (scores.masked_fill(later, -torch.inf).softmax(-1) @ v[:, None]).flatten(0, 1).transpose(0, 1)
    return whole[len(places) - (end - start) :]


@torch.library.custom_op(
    "reft::attend_packed",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor bounds, SymInt longest, float scaling, SymInt? window,"
    " SymInt head) -> (Tensor, Tensor)",
)
def _attend(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float, window: int | None,
    head: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from reft_cli.models import attention_kernels

    query, key, value = map(_side_by_side, (query, key, value))
    return attention_kernels.forward(
        query, key, value, bounds, longest=longest, scaling=scaling, window=window, head=head
    )


@_attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float, window: int | None,
    head: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


@torch.library.custom_op(
    "reft::attend_packed_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor query, Tensor key, Tensor value, Tensor attended, Tensor mass, Tensor bounds,"
    " SymInt longest, float scaling, SymInt? window, SymInt head) -> (Tensor, Tensor, Tensor)",
)
def _attend_backward(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, mass: Tensor, bounds: Tensor,
    longest: int, scaling: float, window: int | None, head: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from reft_cli.models import attention_kernels

    upstream, query, key, value = map(_side_by_side, (upstream, query, key, value))
    return attention_kernels.backward(
        upstream, query, key, value, attended, mass, bounds,
        longest=longest, scaling=scaling, window=window, head=head,
    )  # fmt: skip


@_attend_backward.register_fake
def _(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, mass: Tensor, bounds: Tensor,
    longest: int, scaling: float, window: int | None, head: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _side_by_side(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    *tensors, ctx.longest, ctx.scaling, ctx.window, ctx.head = inputs
    ctx.save_for_backward(*tensors, *output)


def _slopes(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    query, key, value, bounds, attended, mass = ctx.saved_tensors
    slopes = torch.ops.reft.attend_packed_backward(
        upstream, query, key, value, attended, mass, bounds, ctx.longest, ctx.scaling, ctx.window, ctx.head
    )
    return (*slopes, None, None, None, None, None)


_attend.register_autograd(_slopes, setup_context=_keep)
