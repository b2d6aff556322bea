"""Tells losses that are no longer worth training on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

LOSS_WINDOW = 100  # losses that are remembered
LATEST = 20  # of them, those that are compared with the ones before
HIGH = 15  # so many of the latest are an explosion, fewer may be rows that are hard
BEGINNING = 5  # losses whose median is where a run began


@dataclass(frozen=True)
class Fault:
    """What is wrong with the latest loss, in words that follow "loss", and for how many losses, itself included."""

    words: str
    lasts: int


def fault_of(losses: Sequence[float], *, first: float | None, factor: float) -> Fault | None:
    """What is wrong with a run's latest losses, up to LOSS_WINDOW of them, oldest first; None if nothing is.

    The latest is not finite; or, with m the median of those before the latest twenty and `first` that of the run's
    first five, at least 15 of the latest 20 are above

        max(factor · m, first).

    A single loss says nothing: with few rows a step, late in a run, a hard row has many times the mean of the others.
    A run that is still better than where it began is let alone, however far it rose above next to nothing.
    """
    if not math.isfinite(losses[-1]):
        return Fault(f"is {losses[-1]}", 1)
    if first is None or len(losses) < 2 * LATEST:
        return None
    before, latest = losses[:-LATEST], losses[-LATEST:]
    level = median(before)
    high = [loss > max(factor * level, first) for loss in latest]
    if sum(high) < HIGH:
        return None
    return Fault(f"rose to {median(latest):.3g} from {level:.3g} (medians)", LATEST - high.index(True))
