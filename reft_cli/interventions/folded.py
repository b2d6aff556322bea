"""Folded interventions: a delta in a form that needs no method.

Inference, merging, serving and interop speak these two shapes. Shapes: S sites, r rank, d width, N edited rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional


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
        return functional.linear(wide, down, bias) @ up

    @staticmethod
    def slopes(h: Tensor, upstream: Tensor, *site: Tensor) -> tuple[Tensor, ...]:
        """Gradients to h, down, bias and up of the deltas of h [N, d], along upstream [N, d]."""
        wide, upstream, down, bias, up = _widest(h, upstream, *site)
        inner = upstream @ up.T  # [N, r]
        return inner @ down, inner.T @ wide, inner.sum(0), functional.linear(wide, down, bias).T @ upstream

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


def _widest(*tensors: Tensor) -> list[Tensor]:
    """All in the widest type among them."""
    widest = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return [tensor.to(widest) for tensor in tensors]
