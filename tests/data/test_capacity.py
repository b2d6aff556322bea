"""A filled batch has the loss and the gradients of the batch as it was, in few sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_cli.data.batch import build_batch
from reft_cli.data.capacity import fill, rounded
from reft_cli.data.encode import Example
from reft_cli.models.build import build_intervened
from reft_cli.positions import Positions
from reft_cli.tasks.objectives import TASKS
from tiny_models import base_of


def examples(lengths: list[tuple[int, int]]) -> list[Example]:
    chance = torch.Generator().manual_seed(len(lengths))
    return [
        Example(torch.randint(5, 200, (prompt + answer,), generator=chance).tolist(), prompt, None, "", "", row)
        for row, (prompt, answer) in enumerate(lengths)
    ]


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 30)), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_what_is_filled_in_is_whole(lengths: list[tuple[int, int]]):
    batch = build_batch(examples(lengths), groups=Positions.parse("f3+l2").groups(tied=True), layout="packed",
                        pad_token_id=1)  # fmt: skip
    full = fill(batch, pad_token_id=1)
    bounds = full.inputs["cu_seq_lens_q"]
    size, longest = full.inputs["input_ids"].shape[1], full.inputs["max_length_q"]
    assert full.inputs["position_ids"].shape == (1, size) == full.inputs["input_ids"].shape
    assert bounds[-1] == size and (bounds.diff() >= 0).all() and bounds.diff().max() <= longest
    assert (bounds[: len(lengths) + 1] == batch.inputs["cu_seq_lens_q"]).all()
    starts = torch.cat([torch.arange(span) for span in bounds.diff().tolist()])
    assert (full.inputs["position_ids"][0] == starts).all()
    real = sum(prompt + answer - 1 for prompt, answer in lengths)
    assert size > real and (full.rows["f3+l2"][len(batch.rows["f3+l2"]) :] == size - 1).all()
    assert (full.answer_rows[len(batch.answer_rows) :] == size - 1).all()


@given(st.integers(1, 100_000))
def test_sizes_are_few_and_not_much_larger(count: int):
    size = rounded(count)
    assert count <= size < count + max(64, count / 8 + 1)
    assert rounded(size) == size


def test_there_are_few_sizes():
    assert len({rounded(count) for count in range(1, 100_001)}) == 121


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_loss_and_gradients_are_those_of_the_batch(family: str):
    positions = Positions.parse("f3+l2")
    model = build_intervened(
        base_of(family), method="loreft", layers="all", component="block_output", positions=positions, tied=True,
        rank=2, init="paper", dropout=0.0, dropout_on="delta", seed=0,
    ).train()  # fmt: skip
    batch = build_batch(examples([(9, 3), (2, 4), (14, 2)]), groups=positions.groups(tied=True), layout="packed",
                        pad_token_id=1)  # fmt: skip
    found = []
    with model, model.packing(True):
        for each in (batch, fill(batch, pad_token_id=1)):
            model.bank.refresh()
            with model.editing(each.rows):
                loss = TASKS["causal_lm"].loss(model, each)
                loss.backward()
            model.bank.backpropagate()
            found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.bank.parameters())])
            model.bank.zero_grad()
    model.eval()
    torch.testing.assert_close(found[0], found[1])
