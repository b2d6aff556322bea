"""Orthonormal rows from free weights, for all sites at once.

Shapes: S sites, r rank (rows of a frame), d width.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_ANGLE = 100.0  # in machine epsilons; squared sine between a row and the rows above it


def orthonormal_rows(weight: Tensor) -> Tensor:
    """R [S, r, d], the Gram-Schmidt rows of weight [S, r, d]: R Rᵀ = I, and row i of R is in the span of rows 0 … i.

    Cholesky-QR, twice: with G = W Wᵀ = L Lᵀ the rows of L⁻¹W are orthonormal, up to an error of cond(W)² machine
    epsilons, which the second round removes. Only [S, r, d] and [S, r, r] are ever formed, and the host never waits.

    It computes in float64, and returns the type it was given. Float32 would do for weights of a condition number below
    a few hundred; float64 does for every full-rank float32 weight, and TF32 and autocast leave it alone. MPS has no
    float64: there the limit is a few hundred.

    A site whose rows are linearly dependent in its precision, or not finite, comes back as NaN as a whole.
    The gradient flows through the second round alone: R does not change when W is multiplied by a lower triangular
    matrix of positive diagonal, so the first round may count as a constant.
    """
    wide = weight if weight.device.type == "mps" else weight.double()
    nearly = _solve(_cholesky(wide.detach()), wide)
    return _solve(_cholesky(nearly), nearly).to(weight.dtype)


def _cholesky(rows: Tensor) -> Tensor:
    """L [S, r, r] with L Lᵀ = rows rowsᵀ, NaN where a row is zero or lies in the span of those above it."""
    gram = rows @ rows.mT
    factor, info = torch.linalg.cholesky_ex(gram)
    angle = factor.detach().diagonal(dim1=-2, dim2=-1).square() / gram.detach().diagonal(dim1=-2, dim2=-1)
    sound = (angle > SMALLEST_ANGLE * torch.finfo(rows.dtype).eps).all(-1) & (info == 0)
    return factor.masked_fill(~sound[..., None, None], torch.nan)


def _solve(factor: Tensor, rows: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, rows, upper=False)
