"""Pairs whose reference is kept train as if it were read in every step, and it is read once."""

from __future__ import annotations

import pytest
import torch

from processes import run_as
from reft_cli.data.batch import Batch, build_batch
from reft_cli.data.capacity import fill
from reft_cli.data.examples import Example, Examples
from reft_cli.models.build import build_intervened
from reft_cli.models.intervened import IntervenedModel
from reft_cli.parallel.collective import joined, rank
from reft_cli.positions import Positions
from reft_cli.tasks.preferences import Preference
from reft_cli.training.passes import PlainPasses
from reft_cli.training.reference import ReferencePasses
from tiny_models import base_of

POSITIONS = Positions.parse("f2+l2")
TASK = Preference(beta=0.5)


def pairs(count: int = 7) -> Examples:
    chance = torch.Generator().manual_seed(0)

    def answer(length: int) -> list[int]:
        return torch.randint(5, 200, (length,), generator=chance).tolist()

    made = []
    for row in range(count):
        prompt = answer(3 + row % 3)
        other = Example(prompt + answer(1 + row % 2), len(prompt), None, "", "", row)
        made.append(Example(prompt + answer(2 + row), len(prompt), None, "", "", row, rejected=other))
    return Examples.of(made)


ROWS = pairs()


def intervened() -> IntervenedModel:
    return build_intervened(
        base_of("llama"), method="loreft", layers="all", component="block_output", positions=POSITIONS, tied=True,
        rank=2, init="paper", dropout=0.0, dropout_on="delta", seed=0,
    ).train()  # fmt: skip


def batch(*chosen: int, layout: str = "packed") -> Batch:
    return build_batch(ROWS.take(chosen), groups=POSITIONS.groups(tied=True), layout=layout, pad_token_id=1)


def plain_passes(model: IntervenedModel) -> PlainPasses:
    return PlainPasses(model, TASK, torch.amp.GradScaler("cpu", enabled=False))


class Counting(Preference):
    """Knows for how many pairs the reference was read."""

    read: list[int] = []  # noqa: RUF012  shared on purpose

    def reference(self, model: IntervenedModel, batch: Batch) -> torch.Tensor:
        self.read.append(batch.pairs)
        return super().reference(model, batch)


def step(model: IntervenedModel, passes: PlainPasses | ReferencePasses, batches: list[Batch]) -> list[torch.Tensor]:
    """Loss and gradients of a step."""
    model.bank.refresh()
    loss = sum(passes(each, units=3) for each in batches)
    model.bank.backpropagate()
    gradients = [parameter.grad.clone() for parameter in model.bank.parameters()]
    model.bank.zero_grad()
    return [loss, *gradients]


@pytest.mark.parametrize("layout", ["packed", "padded", "filled"])
def test_what_is_kept_gives_the_loss_and_gradients_of_what_is_read(layout: str):
    model = intervened()
    plain, counting = plain_passes(model), Counting(0.5)
    counting.read.clear()
    passes = ReferencePasses(plain, model, counting, ROWS)

    def made(*chosen: int) -> Batch:
        return batch(*chosen, layout="padded" if layout == "padded" else "packed")

    def prepared(one: Batch) -> Batch:
        return fill(one, pad_token_id=1) if layout == "filled" else one

    # two steps of new pairs, one of both passes; then pairs of both, in other batches
    steps = [((0, 3), (5,)), ((1, 2, 6),), ((6, 0, 1),), ((3,), (2, 5, 1, 0, 6))]
    with model, model.packing(layout != "padded"):
        for index, chosen in enumerate(steps):
            expected = step(model, plain, [made(*each) for each in chosen])
            before = len(counting.read)
            with passes.of_step(ROWS.take([row for each in chosen for row in each])):
                found = step(model, passes, [prepared(made(*each)) for each in chosen])
            assert (len(counting.read) > before) == (index < 2)
            if index < 2 and layout != "filled":
                assert all(map(torch.equal, found, expected))  # the very same bits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert [passes.state()[row].isnan().all().item() for row in range(7)] == [row == 4 for row in range(7)]
    model.eval()


def test_kept_numbers_are_those_of_each_pair_and_can_be_given_back():
    model = intervened()
    passes = ReferencePasses(plain_passes(model), model, TASK, ROWS)
    with model, model.packing(True):
        with passes.of_step(ROWS):
            step(model, passes, [batch(4, 2, 6), batch(1, 0, 5, 3)])
        with model.editing(None):
            alone = torch.cat([TASK.reference(model, batch(row)) for row in range(7)])
        torch.testing.assert_close(passes.state(), alone, rtol=1e-5, atol=1e-5)
        again = ReferencePasses(plain_passes(model), model, Counting(0.5), ROWS)
        again.restore(passes.state())
        Counting.read.clear()
        with passes.of_step(ROWS), again.of_step(ROWS):
            found = step(model, again, [batch(2, 3)])
            assert all(map(torch.equal, found, step(model, passes, [batch(2, 3)]))) and not Counting.read
        partly = passes.state()
        partly[5] = torch.nan
        again.restore(partly)
        with again.of_step(ROWS.take([2, 5])):  # one that is known beside one that is not
            step(model, again, [batch(2, 5)])
        torch.testing.assert_close(again.state(), alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"references is \[3, 2\] of torch.float32, for 7 pairs"):
        again.restore(torch.zeros(3, 2))
    model.eval()


def shared() -> list[list[float]]:
    """Of the pairs of a step, one is read here and one everywhere; what is known in the end."""
    model = intervened()
    passes = ReferencePasses(plain_passes(model), model, TASK, ROWS)
    with joined(device="cpu"):
        with model, model.packing(True), passes.of_step(ROWS.take([0, 1, 2])):
            step(model, passes, [batch(rank()), batch(2)])
    return passes.state().tolist()


def test_what_one_process_reads_all_of_them_know():
    one, other = (torch.tensor(each) for each in run_as(shared))
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert one.isnan().all(1).tolist() == [False] * 3 + [True] * 4
