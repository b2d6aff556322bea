"""Learning rates are those of transformers' schedules; every epoch is a permutation that the seed decides."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from reft_cli.training.schedule import Order, rate_factor


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_rates_are_those_of_transformers(schedule: str, warmup: int):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if schedule == "constant":
        theirs = transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    else:
        theirs = getattr(transformers, f"get_{schedule}_schedule_with_warmup")(optimizer, warmup, 40)
    for step in range(40):
        ours = rate_factor(step, steps=40, warmup_steps=warmup, schedule=schedule)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


@given(rows=st.integers(1, 60), size=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_every_epoch_sees_every_row_once(rows: int, size: int, seed: int):
    order = Order(rows, size, seed)
    for epoch in range(2):
        permutation = order.permutation(epoch)
        assert permutation == order.permutation(epoch)
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        seen = [row for step in steps for row in order.global_batch(step, permutation)]
        assert sorted(seen) == list(range(rows))


def test_orders_differ_by_epoch_and_seed():
    orders = [Order(50, 8, seed).permutation(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize(("epochs", "limit", "steps"), [(1, None, 7), (0.5, None, 4), (3, 5, 5), (2, 100, 14)])
def test_steps_of_a_run(epochs: float, limit: int | None, steps: int):
    assert Order(50, 8, 0).steps(epochs, limit) == steps
