"""Where a model is edited: a site is (layer, component, position group). Data only."""

from __future__ import annotations

from dataclasses import dataclass

from reft_cli.positions import PositionGroup


@dataclass(frozen=True)
class Site:
    """One place of one block, and the name of the position group that is edited there."""

    layer: int
    component: str
    group: str


def plan_sites(*, layers: tuple[int, ...], component: str, groups: tuple[PositionGroup, ...]) -> tuple[Site, ...]:
    """All sites of an intervention, group by group and layers rising: the order of a bank's rows."""
    return tuple(Site(layer, component, group.name) for group in groups for layer in layers)
