"""A common head ends where tokens or edits differ, and before the last token of the shortest prompt."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_cli.data import heads
from reft_cli.data.batch import build_batch
from reft_cli.data.capacity import fill
from reft_cli.data.examples import Example, Examples
from reft_cli.data.heads import LEAST, START, common_head, cut_alike, typical_head
from reft_cli.positions import Positions

HEAD = list(range(100, 130))


def groups(text: str):
    return Positions.parse(text).groups(tied=False)


def rows(*rests: tuple[int, int], head: int = 30) -> Examples:
    """Prompts that begin alike and go on differently; of each the other tokens of its prompt and its answer."""
    return Examples.of(
        Example([*HEAD[:head], *range(10 * row, 10 * row + prompt + answer)], head + prompt, None, "", "", row)
        for row, (prompt, answer) in enumerate(rests)
    )


@pytest.mark.parametrize(
    ("positions", "rests", "length"),
    [
        ("f7", [(9, 3), (5, 2)], 30),
        ("f7+l7", [(9, 3), (9, 3)], 30),
        ("f7+l7", [(9, 3), (5, 2)], 28),  # 7 tokens before the end of the shorter prompt
        ("prompt", [(1, 3), (5, 2)], 30),
        ("all", [(1, 3), (5, 2)], 30),
        ("generated", [(1, 3), (5, 2)], 30),
        ("f40+l1", [(9, 3), (5, 2)], 30),
        ("f20+l20", [(9, 3), (5, 2)], 17),  # a prompt of 35 is split 17 and 18
        ("f16+l20", [(9, 3), (5, 2)], 16),
        ("f15+l20", [(9, 3), (5, 2)], 0),  # 15 are too few
        ("f7", [(0, 3), (5, 2)], 29),  # one token of every prompt comes after it
        ("f7", [(9, 3)], 0),
    ],
)
def test_where_a_head_ends(positions: str, rests: list[tuple[int, int]], length: int):
    assert common_head(rows(*rests), groups=groups(positions)) == length


def test_rows_that_are_cut_have_one_that_they_hold():
    assert common_head(rows((9, 3), (5, 2)).cut_at(25), groups=groups("f7")) == 24


def test_many_rows_have_the_head_of_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heads, "TOGETHER", 3)
    asked = [*rows(*[(9, 3)] * 9), *rows((9, 3), (9, 3), head=25)[1:], *rows(*[(9, 3)] * 3)[1:]]
    assert common_head(Examples.of(asked[:9]), groups=groups("f7")) == 30
    assert common_head(Examples.of(asked), groups=groups("f7")) == 25
    assert common_head(Examples.of([*asked, Example([5] * 40, 39, None, "", "", 9)]), groups=groups("f7")) == 0


def test_rows_of_other_templates_have_none():
    assert common_head(rows((9, 3), (5, 2), head=LEAST - 1), groups=groups("f7")) == 0
    odd = Examples.of([*rows((9, 3), (5, 2)), Example([5, 6, 7], 2, None, "", "", 9)])
    assert common_head(odd, groups=groups("f7")) == 0
    assert typical_head(odd, groups=groups("f7"), rows=32) == typical_head(odd, groups=groups("f7"), rows=1) == 0
    assert typical_head(rows(*[(9, 3)] * 50), groups=groups("f7"), rows=8) == 30


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), min_size=1, max_size=6),
    st.sampled_from(["f7+l7", "f3", "l4", "prompt", "all", "generated", "f20+l20"]),
)
@settings(max_examples=80, deadline=None)
def test_a_shared_batch_is_the_same_tokens_edits_and_answers(rests: list[tuple[int, int]], positions: str):
    given_rows = rows(*rests)
    whole, shared = (
        build_batch(given_rows, groups=groups(positions), layout="packed", pad_token_id=1, share_head=each)
        for each in (False, True)
    )
    bounds, ids = shared.inputs["cu_seq_lens_q"].tolist(), shared.inputs["input_ids"][0]
    head = common_head(given_rows, groups=groups(positions))
    assert shared.inputs["shared_head"] == bounds[1] == head
    assert shared.inputs["max_length_q"] == max(b - a for a, b in pairwise(bounds))
    # where the tokens of the whole batch stand in the shared one
    at = torch.cat([torch.cat([torch.arange(head), torch.arange(start, end)]) for start, end in pairwise(bounds[1:])])
    assert torch.equal(ids[at], whole.inputs["input_ids"][0])
    assert torch.equal(shared.inputs["position_ids"][0][at], whole.inputs["position_ids"][0])
    assert torch.equal(at[whole.answer_rows], shared.answer_rows) and torch.equal(whole.targets, shared.targets)
    assert torch.equal(given_rows_tokens(given_rows)[shared.places], ids)
    assert torch.unique(at).tolist() == list(range(len(ids)))
    for name, edited in shared.rows.items():
        assert sorted(edited.tolist()) == torch.unique(at[whole.rows[name]]).tolist()  # each edit once
        marked = torch.zeros(len(at), dtype=torch.bool)
        marked[whole.rows[name]] = True
        assert torch.equal(torch.isin(at, edited), marked)  # and nothing else


@given(
    st.lists(st.tuples(st.sampled_from([0, 20, 30]), st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=6),
    st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_passes_are_cut_where_heads_save_most(drawn: list[tuple[int, int, int]], most: int):
    asked = [
        Example([*HEAD[:head], *range(row, row + prompt + answer)], head + prompt, None, "", "", row)
        for row, (head, prompt, answer) in enumerate(drawn)
    ]
    passes = cut_alike(asked, rows=most)
    assert sorted(each.row for chosen in passes for each in chosen) == list(range(len(asked)))
    assert all(len(chosen) <= most for chosen in passes)
    assert all(one.size >= other.size for chosen in passes for one, other in pairwise(chosen))

    def cost(chosen: list[Example]) -> int:
        head = common_head(Examples.of(chosen), groups=())
        return START + sum(each.size for each in chosen) - head * (len(chosen) - 1)

    def cheapest(ordered: list[Example]) -> int:
        ways = range(1, min(most, len(ordered)) + 1)
        return min((cost(ordered[:count]) + cheapest(ordered[count:]) for count in ways), default=0)

    assert sum(map(cost, passes)) == cheapest(sorted(asked, key=lambda each: each.input_ids))


def given_rows_tokens(examples: Examples) -> torch.Tensor:
    return torch.from_numpy(examples.tokens).long()


def test_filling_leaves_room_for_any_head():
    for head in (0, 20, 30):
        batch = build_batch(
            rows((9, 3), (5, 2), head=head), groups=groups("f7"), layout="packed", pad_token_id=1, share_head=True
        )
        full = fill(batch, pad_token_id=1)
        assert full.inputs["shared_head"] == 64 and full.inputs["cu_seq_lens_q"][1] == head
