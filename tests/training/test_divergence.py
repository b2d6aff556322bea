"""Noise is no divergence, however far single losses rise; losses that stay far above the recent ones are."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from statistics import median

import pytest

from reft_cli.training.divergence import LOSS_WINDOW, Fault, fault_of

FACTOR = 4.0
NEAR_NOTHING = [0.001] * 100


def first_fault(losses: list[float], *, factor: float = FACTOR) -> tuple[int, Fault] | None:
    """(step, fault) at which a run with these losses would be stopped."""
    for step in range(1, len(losses) + 1):
        recent = losses[max(step - LOSS_WINDOW, 0) : step]
        first = median(losses[:5]) if step >= 5 else None
        fault = fault_of(recent, first=first, factor=factor)
        if fault:
            return step, fault
    return None


def learning(draw: random.Random, *, first: float, last: float) -> Iterator[float]:
    """Losses that fall from one level to another within some hundred steps, each log-normal around it."""
    step = 0
    while True:
        yield (last + (first - last) * math.exp(-step / 60)) * draw.lognormvariate(0, 0.3)
        step += 1


def hard_rows(draw: random.Random) -> list[float]:
    """One row a step, late in a run: next to nothing, and for a row in four as much as untrained, or twice that."""
    levels = learning(draw, first=6.0, last=0.001)
    return [draw.uniform(3, 12) if step > 100 and draw.random() < 0.25 else next(levels) for step in range(5_000)]


def wrong_labels(draw: random.Random) -> list[float]:
    """A classifier that knows that a label in four is wrong: -ln 0.75 for right ones, -ln 0.25 for wrong ones."""
    start = [0.7 * draw.uniform(0.8, 1.2) for _ in range(50)]
    return start + [-math.log(0.25 if draw.random() < 0.25 else 0.75) for _ in range(5_000)]


def lucky_start(draw: random.Random) -> list[float]:
    """A first row that the base model knows already, and nothing learned."""
    return [0.01] + [draw.lognormvariate(0, 1) for _ in range(5_000)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("losses", [hard_rows, wrong_labels, lucky_start])
def test_noise_is_let_alone(losses, seed: int):
    assert first_fault(losses(random.Random(seed))) is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("last", "exploded"),
    [
        (2.0, 11.0),  # to the loss of a uniform guess among 60,000 tokens
        (0.01, 30.0),
    ],
)
def test_losses_that_jump_and_stay_are_a_divergence(last: float, exploded: float, seed: int):
    draw = random.Random(seed)
    levels = learning(draw, first=6.0, last=last)
    losses = [next(levels) for _ in range(400)] + [exploded * draw.lognormvariate(0, 0.15) for _ in range(40)]
    found = first_fault(losses)
    assert found is not None
    step, fault = found
    assert 415 <= step <= 425 and 401 <= step - fault.lasts + 1 <= 405  # where it was seen, and where it began


def test_losses_that_grow_are_a_divergence():
    losses = [1.0] * 60 + [1.1**step for step in range(80)]
    found = first_fault(losses)
    assert found is not None and found[0] < 60 + 40


@pytest.mark.parametrize(
    ("losses", "fault"),
    [
        ([math.nan], Fault("is nan", 1)),
        ([*NEAR_NOTHING, math.inf], Fault("is inf", 1)),
        ([*NEAR_NOTHING, 7.0], None),
        ([*NEAR_NOTHING, *[7.0] * 14], None),
        ([*NEAR_NOTHING, *[7.0] * 15], Fault("rose to 7 from 0.001 (medians)", 15)),
        ([*NEAR_NOTHING, *[0.5] * 20], None),  # still better than where it began
        ([*[1.0] * 24, *[7.0] * 15], None),  # too few to know
        ([*[1.0] * 25, *[7.0] * 15], Fault("rose to 7 from 1 (medians)", 15)),
        ([*[1.0] * 20, *[10.0] * 60, *[39.0] * 20], None),  # of all eighty before, and times the factor
        ([*[1.0] * 20, *[10.0] * 60, *[41.0] * 20], Fault("rose to 41 from 10 (medians)", 20)),
    ],
)
def test_faults(losses: list[float], fault: Fault | None):
    assert fault_of(losses[-LOSS_WINDOW:], first=6.0, factor=FACTOR) == fault
