"""Folded interventions: a delta in a form that needs no method.

Inference, merging, serving and interop speak these two shapes. Shapes: S sites, r rank, d width, N edited rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

WRITTEN_OUT = 16  # rank up to which products are written as sums when compiled


@dataclass(frozen=True)
class FoldedLowRank:
    """delta = (h downᵀ + bias) up, of each site."""

    down: Tensor  # [S, r, d]
    bias: Tensor  # [S, r]
    up: Tensor  # [S, r, d]

    def tensors(self) -> tuple[Tensor, ...]:
        """The stacked tensors, in the order of the fields."""
        return self.down, self.bias, self.up

    @staticmethod
    def rows(h: Tensor, *site: Tensor) -> Tensor:
        """Delta [N, d] of the rows h [N, d], from one site's down [r, d], bias [r] and up [r, d]."""
        wide, down, bias, up = _widest(h, *site)
        return _expand(_contract(wide, down) + bias, up)

    @staticmethod
    def slopes(h: Tensor, upstream: Tensor, *site: Tensor) -> tuple[Tensor, ...]:
        """Gradients to h, down, bias and up of the deltas of h [N, d], along upstream [N, d]."""
        wide, upstream, down, bias, up = _widest(h, upstream, *site)
        inner = _contract(upstream, up)  # [N, r]
        return _expand(inner, down), inner.T @ wide, inner.sum(0), (_contract(wide, down) + bias).T @ upstream

    def delta(self, site: int, h: Tensor) -> Tensor:
        """Delta [N, d] of the rows h [N, d] at a site."""
        return self.rows(h, *(tensor[site] for tensor in self.tensors()))


@dataclass(frozen=True)
class FoldedDiagonal:
    """delta = scale ⊙ h + bias, of each site. `scale` multiplies in the delta: RED's s is scale + 1."""

    scale: Tensor  # [S, d]
    bias: Tensor  # [S, d]

    def tensors(self) -> tuple[Tensor, ...]:
        """The stacked tensors, in the order of the fields."""
        return self.scale, self.bias

    @staticmethod
    def rows(h: Tensor, *site: Tensor) -> Tensor:
        """Delta [N, d] of the rows h [N, d], from one site's scale [d] and bias [d]."""
        scale, bias = site
        return torch.addcmul(bias, h, scale)  # promotes to scale's type; autograd keeps h as it is, not a wide copy

    @staticmethod
    def slopes(h: Tensor, upstream: Tensor, *site: Tensor) -> tuple[Tensor, ...]:
        """Gradients to h, scale and bias of the deltas of h [N, d], along upstream [N, d]."""
        wide, upstream, scale, _ = _widest(h, upstream, *site)
        return upstream * scale, (upstream * wide).sum(0), upstream.sum(0)

    def delta(self, site: int, h: Tensor) -> Tensor:
        """Delta [N, d] of the rows h [N, d] at a site."""
        return self.rows(h, *(tensor[site] for tensor in self.tensors()))


Folded = FoldedLowRank | FoldedDiagonal


def _contract(h: Tensor, narrow: Tensor) -> Tensor:
    """h [N, d] × narrowᵀ [d, r]."""
    if _written_out(narrow):
        return (h[:, None] * narrow).sum(-1)
    return h @ narrow.T


def _expand(inner: Tensor, narrow: Tensor) -> Tensor:
    """inner [N, r] × narrow [r, d]."""
    if _written_out(narrow):
        return (inner[:, :, None] * narrow).sum(1)
    return inner @ narrow


def _written_out(narrow: Tensor) -> bool:
    """Whether a product is better written as sums, which a compiler joins to what stands before and after.

    Matrix units have nothing to do at such widths: on an H200 [448, 4096] × [4096, 8] in float32 takes 31 µs.
    """
    return torch.compiler.is_compiling() and narrow.is_cuda and narrow.shape[0] <= WRITTEN_OUT


def _widest(*tensors: Tensor) -> list[Tensor]:
    """All in the widest type among them."""
    widest = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return [tensor.to(widest) for tensor in tensors]
