"""Interventions: the edit of hidden states as pure maths, by the name a spec gives it."""

from __future__ import annotations

import torch

from reft_cli.errors import SpecError
from reft_cli.interventions.bank import Bank, DropoutOn, Init
from reft_cli.interventions.folded import Folded, FoldedDiagonal, FoldedLowRank
from reft_cli.interventions.low_rank import ConsReFT, DiReFT, LobiReFT, LoReFT, NoReFT, OrthogonalDiReFT
from reft_cli.interventions.red import RED

__all__ = [
    "METHODS",
    "Bank",
    "DropoutOn",
    "Folded",
    "FoldedDiagonal",
    "FoldedLowRank",
    "Init",
    "build_bank",
]

METHODS: dict[str, type[Bank]] = {
    "loreft": LoReFT,
    "noreft": NoReFT,
    "direft": DiReFT,
    "direft_orthogonal": OrthogonalDiReFT,
    "consreft": ConsReFT,
    "lobireft": LobiReFT,
    "red": RED,
}


def build_bank(
    method: str,
    *,
    sites: int,
    width: int,
    rank: int | None,
    init: Init,
    dropout: float,
    dropout_on: DropoutOn,
    generator: torch.Generator,
) -> Bank:
    """A bank with parameters drawn on the CPU: the same generator state gives the same weights on every device.

    SpecError if the rank does not fit; ValueError if the method has no such start (consreft, identity).
    """
    if method != "red":
        if rank is None:
            raise SpecError(f"intervention.rank: {method} needs one; 4 is usual")
        if rank > width:
            raise SpecError(f"intervention.rank: {rank} is more than the {width} dimensions of a hidden state there")
    bank = METHODS[method](sites=sites, width=width, rank=rank, dropout=dropout, dropout_on=dropout_on)
    bank.initialise(init, generator)
    return bank
