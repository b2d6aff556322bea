"""Tells a loss that is no longer worth training on."""

from __future__ import annotations

import math
from collections.abc import Sequence

LOSS_WINDOW = 100  # losses that are remembered
WATCH_FROM = 20  # losses that must be known before one can be called exploded


def fault_of(loss: float, *, recent: Sequence[float], first: float, factor: float) -> str | None:
    """What is wrong with a loss, in words that follow "loss"; None if nothing is.

    It is not finite; or it is `factor` times the mean of the recent ones and above the `first` of the run. The second
    half lets a run alone whose loss is next to nothing and jumps: it is still better than where it began.
    """
    if not math.isfinite(loss):
        return f"is {loss}"
    if len(recent) < WATCH_FROM:
        return None
    mean = sum(recent) / len(recent)
    return f"rose to {loss:.3g} from a mean of {mean:.3g}" if loss > max(factor * mean, first) else None
