"""The low-rank methods. A class is a formula; its delta is computed in the folded form, which is the same number.

Shapes: S sites, r rank, d width. R, W and W₂ are [r, d] a site. Formulas act on column vectors, as in the paper
(arXiv 2404.03592); on rows h [N, d], Rᵀ(Wh + b) is (h Wᵀ + b) R.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from reft_cli.interventions.bank import Bank, DropoutOn, Init
from reft_cli.interventions.folded import FoldedLowRank
from reft_cli.interventions.frames import orthonormal_rows

# Length of the rows of the free weight behind R at the start. R then moves twice as far as its weight, and less as the
# weight grows, as with pyreft's parametrization, so that published learning rates mean the same here.
ROW_NORM = 0.5


class LowRankBank(Bank):
    """What the low-rank methods share.

    State: `projection` [S, r, d], `source_weight` [S, r, d] where the formula has W, `source_bias` [S, r].
    In the orthogonal methods `projection` is the free weight whose Gram-Schmidt rows are R.
    """

    form = FoldedLowRank
    orthogonal: ClassVar[bool]
    has_weight: ClassVar[bool] = True

    def __init__(
        self, *, sites: int, width: int, rank: int | None, dropout: float = 0.0, dropout_on: DropoutOn = "delta"
    ) -> None:
        super().__init__(sites=sites, width=width, rank=rank, dropout=dropout, dropout_on=dropout_on)
        assert rank is not None
        self.projection = nn.Parameter(torch.zeros(sites, rank, width))
        if self.has_weight:
            self.source_weight = nn.Parameter(torch.zeros(sites, rank, width))
        self.source_bias = nn.Parameter(torch.zeros(sites, rank))

    @torch.no_grad()
    def initialise(self, init: Init, generator: torch.Generator) -> None:
        """paper: R is a uniformly random frame; W₂, W and b are U(−1/√d, 1/√d); a bias without W is U(0, 1).

        identity: b = 0, and W = R, W = W₂ or W = 0, whichever makes the delta zero.
        """
        bound = self.width**-0.5
        if self.orthogonal:
            self.projection.normal_(0, ROW_NORM * bound, generator=generator)
        else:
            self.projection.uniform_(-bound, bound, generator=generator)
        if init == "identity":
            self._make_identity()
        elif self.has_weight:
            self.source_weight.uniform_(-bound, bound, generator=generator)
            self.source_bias.uniform_(-bound, bound, generator=generator)
        else:
            self.source_bias.uniform_(0, 1, generator=generator)

    def _make_identity(self) -> None:
        """Set W; the bias is zero already, and so is W."""

    def rows(self) -> Tensor:
        """R or W₂ [S, r, d], as a differentiable function of `projection`."""
        return orthonormal_rows(self.projection) if self.orthogonal else self.projection


class LoReFT(LowRankBank):
    """delta = Rᵀ(Wh + b − Rh), the rows of R orthonormal (paper eq. 2; pyreft LoreftIntervention)."""

    method = "loreft"
    orthogonal = True
    undecayed = frozenset({"projection", "source_bias"})

    def _fold(self) -> FoldedLowRank:
        rows = self.rows()
        return FoldedLowRank(self.source_weight - rows, self.source_bias, rows)

    def _make_identity(self) -> None:
        self.source_weight.copy_(self.rows())


class NoReFT(LoReFT):
    """delta = W₂ᵀ(Wh + b − W₂h): LoReFT without orthonormality (pyreft NoreftIntervention)."""

    method = "noreft"
    orthogonal = False
    undecayed = frozenset({"source_bias"})


class DiReFT(LowRankBank):
    """delta = W₂ᵀ(Wh + b), W₂ free (paper eq. 3; pyreft NodireftIntervention; adapters DiReftConfig)."""

    method = "direft"
    orthogonal = False
    undecayed = frozenset({"source_bias"})

    def _fold(self) -> FoldedLowRank:
        return FoldedLowRank(self.source_weight, self.source_bias, self.rows())


class OrthogonalDiReFT(DiReFT):
    """delta = Rᵀ(Wh + b), the rows of R orthonormal (pyreft DireftIntervention; not the paper's DiReFT)."""

    method = "direft_orthogonal"
    orthogonal = True
    undecayed = frozenset({"projection", "source_bias"})


class ConsReFT(LowRankBank):
    """delta = Rᵀ(b − Rh), the rows of R orthonormal: sets the subspace to a constant (pyreft ConsreftIntervention)."""

    method = "consreft"
    orthogonal = True
    has_weight = False
    undecayed = frozenset({"projection", "source_bias"})

    def _fold(self) -> FoldedLowRank:
        rows = self.rows()
        return FoldedLowRank(-rows, self.source_bias, rows)

    def _make_identity(self) -> None:
        raise ValueError("init: identity does not exist for consreft (it sets the subspace to a constant); use paper")


class LobiReFT(LowRankBank):
    """delta = Rᵀb, the rows of R orthonormal: the same edit for every h (pyreft LobireftIntervention)."""

    method = "lobireft"
    orthogonal = True
    has_weight = False
    undecayed = frozenset({"projection", "source_bias"})

    def _fold(self) -> FoldedLowRank:
        return FoldedLowRank(torch.zeros_like(self.projection), self.source_bias, self.rows())
