"""Cross-entropy from hidden states, through the unembedding, without all logits in memory at once.

The unembedding is frozen, so that the gradient to the hidden states can be formed together with the loss, a chunk of
rows at a time: logits exist for one chunk only, and nothing of their size waits for the backward pass.

Shapes: K answer rows, D hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from reft_cli.data.batch import IGNORED
from reft_cli.models.compiling import compiled

CHUNK = 2**27  # logits at once: 512 MiB in float32

Chunk = Callable[[Tensor, Tensor, Tensor | None, Tensor, bool], tuple[Tensor, Tensor]]


def linear_cross_entropy(
    h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, fused: bool = False
) -> Tensor:
    """Σ −log softmax(h weightᵀ + bias)[target] over rows h [K, D] whose target is not IGNORED; float32, scalar.

    weight [V, D] and bias [V] are frozen. The softmax is float32; `fused` compiles it. Equal to torch's cross_entropy
    of the float32 logits, summed: the gradient to the logits is rounded to the type of h there too.
    """
    loss: Tensor = _LinearCrossEntropy.apply(h, weight, bias, targets, fused)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  torch gives the context no public type
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        fused: bool,
    ) -> Tensor:
        size = max(1, CHUNK // weight.shape[0])
        chunk: Chunk = _fused_chunk() if fused else _chunk
        slopes = ctx.needs_input_grad[0]
        parts = zip(h.split(size), targets.split(size), strict=True)
        losses, gradients = zip(*(chunk(rows, weight, bias, wanted, slopes) for rows, wanted in parts), strict=True)
        if slopes:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * upstream).to(gradient.dtype), None, None, None, None


def _chunk(h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, slopes: bool) -> tuple[Tensor, Tensor]:
    """(summed loss, its gradient to h [C, D]; empty if not wanted)."""
    logits = linear(h, weight, bias)  # [C, V]
    wide = logits.float()
    learned = targets != IGNORED
    at = targets.where(learned, 0)[:, None]
    total = torch.logsumexp(wide, 1, keepdim=True)
    loss = ((total - wide.gather(1, at)).squeeze(1) * learned).sum()
    if not slopes:
        return loss, h.new_empty(0)
    hit = torch.arange(weight.shape[0], device=h.device) == at  # [C, V]
    slope = wide.sub_(total).exp_().sub_(hit.byte()).mul_(learned[:, None])  # in place: the softmax less the target
    return loss, slope.to(h.dtype) @ weight


@cache
def _fused_chunk() -> Chunk:
    return compiled(_chunk)
