"""Batches: the rows that are edited and that answer, the same in every layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reft_cli.data.batch import Layout, build_batch, micro_batches
from reft_cli.data.examples import Example, Examples
from reft_cli.models.build import build_intervened
from reft_cli.positions import Positions
from reft_cli.tasks.objectives import TASKS
from tiny_models import DECODERS, base_of


def example(prompt: int, answer: int, *, row: int = 1, label: int | float | None = None) -> Example:
    ids = [(7 * row + 3 * token) % 290 + 2 for token in range(prompt + answer)]
    return Example(ids, prompt, label, "", "", row)


EXAMPLES = [example(5, 2, row=1), example(1, 3, row=2), example(9, 1, row=3), example(2, 2, row=4)]
GROUPS = Positions.parse("f3+l3").groups(tied=True)


def test_padded_rows_and_targets():
    batch = build_batch(EXAMPLES[:2], groups=GROUPS, layout="padded", pad_token_id=1)
    assert batch.inputs["input_ids"].shape == (2, 6)  # the last token of an answer is no input
    assert batch.inputs["attention_mask"].tolist() == [[1] * 6, [1] * 3 + [0] * 3]
    assert batch.rows["f3+l3"].tolist() == [0, 1, 2, 3, 4, 6]
    assert batch.answer_rows.tolist() == [4, 5, 6, 7, 8]
    assert batch.targets.tolist() == [*EXAMPLES[0].input_ids[5:], *EXAMPLES[1].input_ids[1:]]


def test_packed_rows_and_targets():
    batch = build_batch(EXAMPLES[:2], groups=GROUPS, layout="packed", pad_token_id=1)
    assert batch.inputs["input_ids"].tolist() == [EXAMPLES[0].input_ids[:-1] + EXAMPLES[1].input_ids[:-1]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2]]
    assert batch.inputs["cu_seq_lens_q"].tolist() == [0, 6, 9]
    assert batch.rows["f3+l3"].tolist() == [0, 1, 2, 3, 4, 6]
    assert batch.answer_rows.tolist() == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("labelled", [False, True])
def test_a_batch_of_pairs_is_that_of_its_sequences(layout: Layout, labelled: bool):
    chosen = [example(5, 2, row=1), example(3, 4, row=2)]
    rejected = [replace(example(5, 6, row=5), row=1), replace(example(2, 1, row=6), row=2)]
    paired = [replace(one, rejected=other) for one, other in zip(chosen, rejected, strict=True)]
    if labelled:
        paired = [replace(each, label=1) for each in paired]
    batch = build_batch(paired, groups=GROUPS, layout=layout, pad_token_id=1)
    assert batch.pairs == 2
    if labelled:  # every token is read
        flat = (
            batch.inputs["input_ids"][batch.inputs["attention_mask"] == 1]
            if layout == "padded"
            else batch.inputs["input_ids"][0]
        )
        assert flat.tolist() == [token for each in (*chosen, *rejected) for token in each.input_ids]
        assert batch.labels is not None and batch.labels.tolist() == [1, 1, 0, 0]
        assert len(batch.targets) == 0
        return
    single = build_batch([*chosen, *rejected], groups=GROUPS, layout=layout, pad_token_id=1)
    for one, other in ((batch.rows["f3+l3"], single.rows["f3+l3"]), (batch.targets, single.targets)):
        assert one.tolist() == other.tolist()
    assert batch.inputs["input_ids"].tolist() == single.inputs["input_ids"].tolist()
    assert batch.answer_rows.tolist() == single.answer_rows.tolist()
    assert batch.owners is not None and batch.owners.tolist() == [0] * 2 + [1] * 4 + [2] * 6 + [3]
    assert single.owners is None and single.pairs == 0


@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 6)), min_size=1, max_size=8),
    text=st.sampled_from(["f3+l3", "f1", "l7", "all", "prompt", "generated"]),
    tied=st.booleans(),
    packed=st.booleans(),
    label=st.sampled_from([None, 1, 0.5]),
    typed=st.booleans(),
)
def test_a_batch_is_what_a_plain_loop_makes(
    sizes: list[tuple[int, int]], text: str, tied: bool, packed: bool, label: int | float | None, typed: bool
):
    examples = [example(*size, row=row, label=label) for row, size in enumerate(sizes, start=1)]
    if typed:
        examples = [replace(each, token_types=[token % 2 for token in each.input_ids]) for each in examples]
    groups = Positions.parse(text).groups(tied=tied)
    layout: Layout = "packed" if packed else "padded"
    given_in = [each.input_ids[:-1] if each.learned else each.input_ids for each in examples]
    lengths = [len(each) for each in given_in]
    width = max(lengths)
    starts = [sum(lengths[:at]) if packed else at * width for at in range(len(examples))]
    for given_ones in (examples, Examples.of(examples[::-1])[::-1]):
        batch = build_batch(given_ones, groups=groups, layout=layout, pad_token_id=1)
        if packed:
            assert batch.inputs["input_ids"].tolist() == [[token for each in given_in for token in each]]
        else:
            short = [width - length for length in lengths]
            padded = [each + [1] * gap for each, gap in zip(given_in, short, strict=True)]
            assert batch.inputs["input_ids"].tolist() == padded
            if typed:
                types = [
                    (each.token_types or [])[:length] + [0] * (width - length)
                    for each, length in zip(examples, lengths, strict=True)
                ]
                assert torch.equal(batch.inputs["token_type_ids"], torch.tensor(types))
        placed = list(zip(starts, examples, lengths, strict=True))
        for group in groups:
            assert batch.rows[group.name].tolist() == [
                start + token for start, each, length in placed for token in group.indices(each.prompt_length, length)
            ]
        assert batch.answer_rows.tolist() == [
            start + token
            for start, each, _ in placed
            for token in range(each.prompt_length - 1, len(each.input_ids) - 1)
        ]
        assert batch.targets.tolist() == [token for each in examples for token in each.input_ids[each.prompt_length :]]
        assert batch.labels is None if label is None else batch.labels.tolist() == [label] * len(examples)


@pytest.mark.parametrize("family", [each for each in DECODERS if each != "gemma2"])  # see models/test_packing.py
@pytest.mark.parametrize("positions", ["f3+l3", "all"])
def test_padded_packed_and_single_give_one_loss_and_one_gradient(family: str, positions: str):
    groups = Positions.parse(positions).groups(tied=True)
    found = {}
    for layout in ("padded", "packed", "single"):
        model = build_intervened(
            base_of(family),
            method="loreft",
            layers="all",
            component="block_output",
            positions=Positions.parse(positions),
            tied=True,
            rank=2,
            init="paper",
            dropout=0.0,
            dropout_on="delta",
            seed=0,
        ).train()
        model.bank.refresh()
        parts = [[each] for each in EXAMPLES] if layout == "single" else [EXAMPLES]
        total = 0.0
        with model:
            for part in parts:
                kind = "packed" if layout == "packed" else "padded"
                batch = build_batch(part, groups=groups, layout=kind, pad_token_id=1)
                with model.editing(batch.rows), model.packing(layout == "packed"):
                    loss = TASKS["causal_lm"].loss(model, batch)
                    loss.backward()
                total += float(loss.detach())
        model.bank.backpropagate()
        model.eval()
        found[layout] = (total, {name: p.grad for name, p in model.bank.named_parameters()})
    for other in ("packed", "single"):
        torch.testing.assert_close(found[other], found["padded"], rtol=1e-4, atol=1e-5)


@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=30),
    budget=st.integers(1, 30),
    rows=st.one_of(st.none(), st.integers(1, 5)),
    padded=st.booleans(),
)
def test_micro_batches_are_a_partition_and_as_large_as_the_budget_allows(
    lengths: list[int], budget: int, rows: int | None, padded: bool
):
    examples = [example(length, 1, row=row) for row, length in enumerate(lengths, start=1)]
    parts = list(micro_batches(examples, token_budget=budget, rows=rows, padded=padded))
    assert sorted(each.row for part in parts for each in part) == list(range(1, len(lengths) + 1))

    def fits(part: Sequence[Example]) -> bool:
        sizes = [len(each.input_ids) for each in part]
        return len(part) <= rows if rows else (max(sizes) * len(part) if padded else sum(sizes)) <= budget

    assert all(len(part) == 1 or fits(part) for part in parts)
    assert not any(fits([*part, following[0]]) for part, following in pairwise(parts))


@given(
    prompt=st.integers(1, 40),
    answer=st.integers(0, 5),
    text=st.from_regex(r"f[1-9]|l[1-9]|f[1-9]\+l[1-9]|all|prompt|generated", fullmatch=True),
    tied=st.booleans(),
)
def test_positions_are_inside_and_never_twice(prompt: int, answer: int, text: str, tied: bool):
    positions = Positions.parse(text)
    assert str(positions) == text
    indices = [i for group in positions.groups(tied=tied) for i in group.indices(prompt, prompt + answer)]
    assert len(indices) == len(set(indices))
    limit = prompt if positions.span in (None, "prompt") else prompt + answer
    assert all(0 <= index < limit for index in indices)
    if positions.span is None:
        assert len(indices) == min(prompt, positions.first + positions.last)
