"""Puts an intervened model together from flat values: blocks, layers, sites, bank."""

from __future__ import annotations

import torch

from reft_cli.interventions import DropoutOn, Init, build_bank
from reft_cli.models.blocks import find_blocks, find_target, select_layers, target_width
from reft_cli.models.intervened import IntervenedModel
from reft_cli.models.loading import BaseModel
from reft_cli.models.placement import entry_device
from reft_cli.models.sites import plan_sites
from reft_cli.positions import Positions


def build_intervened(
    base: BaseModel,
    *,
    method: str,
    layers: str | list[int],
    component: str,
    positions: Positions,
    tied: bool,
    rank: int | None,
    init: Init,
    dropout: float,
    dropout_on: DropoutOn,
    seed: int,
) -> IntervenedModel:
    """A base model with a fresh bank at all its sites; the same seed gives the same weights on every machine.

    ModelError: a layer or component that the model does not have.
    """
    blocks = find_blocks(base.model)
    chosen = select_layers(blocks, layers, model_name=base.name)
    groups = positions.groups(tied=tied)
    sites = plan_sites(layers=chosen, component=component, groups=groups)
    width = target_width(base.model, find_target(blocks, chosen[0], component), component)
    bank = build_bank(
        method,
        sites=len(sites),
        width=width,
        rank=rank,
        init=init,
        dropout=dropout,
        dropout_on=dropout_on,
        generator=torch.Generator().manual_seed(seed),
    )
    bank = bank.to(entry_device(base.model))
    return IntervenedModel(base.model, blocks=blocks, bank=bank, sites=sites, groups=groups)
