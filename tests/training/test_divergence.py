"""An exploded loss is one that is far above the recent ones and above where the run began."""

from __future__ import annotations

import math

import pytest

from reft_cli.training.divergence import fault_of

CONVERGED = [0.001] * 100


@pytest.mark.parametrize(
    ("loss", "recent", "fault"),
    [
        (math.nan, [], "is nan"),
        (math.inf, CONVERGED, "is inf"),
        (7.0, CONVERGED, "rose to 7 from a mean of 0.001"),
        (0.5, CONVERGED, None),  # a jump of a loss that is next to nothing
        (7.0, [0.001] * 19, None),  # too few to know
        (7.0, [1.0] * 100, None),
        (11.0, [1.0] * 100, "rose to 11 from a mean of 1"),
    ],
)
def test_faults(loss: float, recent: list[float], fault: str | None):
    assert fault_of(loss, recent=recent, first=6.0, factor=10.0) == fault
