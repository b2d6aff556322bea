"""RED: scale and shift the whole hidden vector (arXiv 2402.15179). Shapes: S sites, d width."""

from __future__ import annotations

import torch
from torch import nn

from reft_cli.interventions.bank import Bank, DropoutOn, Init
from reft_cli.interventions.folded import FoldedDiagonal


class RED(Bank):
    """delta = (s − 1) ⊙ h + b, so that the edited state is s ⊙ h + b.

    State: `scale` s [S, d], starting at 1, and `bias` b [S, d], starting at 0: the identity, whatever `init` is.
    Neither is decayed: weight decay would pull s to 0, not to 1.
    """

    method = "red"
    form = FoldedDiagonal
    undecayed = frozenset({"scale", "bias"})

    def __init__(
        self, *, sites: int, width: int, rank: int | None = None, dropout: float = 0.0, dropout_on: DropoutOn = "delta"
    ) -> None:
        super().__init__(sites=sites, width=width, rank=rank, dropout=dropout, dropout_on=dropout_on)
        assert rank is None
        self.scale = nn.Parameter(torch.ones(sites, width))
        self.bias = nn.Parameter(torch.zeros(sites, width))

    def initialise(self, init: Init, generator: torch.Generator) -> None:
        """Nothing is drawn: s = 1, b = 0."""

    def _fold(self) -> FoldedDiagonal:
        return FoldedDiagonal(self.scale - 1, self.bias)
