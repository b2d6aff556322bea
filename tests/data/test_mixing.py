"""Shares, repetitions and mixes of rows."""

from __future__ import annotations

import pytest

from reft_cli.data.mixing import draw, mix, repeat, set_apart, split_off
from reft_cli.data.records import Rows
from reft_cli.errors import DataError


def rows(count: int, name: str = "a.jsonl") -> Rows:
    numbers = list(range(1, count + 1))
    return Rows(name, [{"n": number} for number in numbers], numbers, [2 * number for number in numbers])


@pytest.mark.parametrize(
    ("total", "share", "count"),
    [
        (10, 3, 3),
        (10, 0.3, 3),
        (10, 0.01, 1),
        (408, "glue", 204),
        (277, "glue", 138),
        (5000, "glue", 2500),
        (5001, "glue", 1000),
        (9815, "glue", 1000),
    ],
)
def test_a_share_and_its_rest_are_a_partition(total: int, share: str | float, count: int):
    all_rows = rows(total)
    drawn, rest = draw(all_rows, share=share, seed=1), draw(all_rows, share=share, seed=1, rest=True)
    assert len(drawn) == count
    assert sorted(drawn.numbers + rest.numbers) == all_rows.numbers
    assert drawn.numbers == sorted(drawn.numbers) and drawn.lines == [2 * number for number in drawn.numbers]
    assert draw(all_rows, share=share, seed=1).numbers == drawn.numbers


def test_another_seed_draws_other_rows():
    assert len({tuple(draw(rows(50), share=5, seed=seed).numbers) for seed in range(4)}) == 4


@pytest.mark.parametrize(("total", "share"), [(3, 3), (3, 4), (1, 0.5), (1, "glue")])
def test_a_share_that_leaves_nothing(total: int, share: str | float):
    with pytest.raises(DataError) as caught:
        draw(rows(total), share=share, seed=0)
    assert str(caught.value) == f"a.jsonl: a share of {share} of {total} rows leaves no row on one side"


@pytest.mark.parametrize(("weight", "count"), [(1.0, 10), (2.0, 20), (2.5, 25), (0.5, 5), (0.01, 1)])
def test_a_weight_is_how_often_a_row_stands(weight: float, count: int):
    numbers = repeat(rows(10), weight=weight, seed=1).numbers
    assert len(numbers) == count
    assert all(int(weight) <= numbers.count(number) <= int(weight) + 1 for number in range(1, 11))


def test_mixed_rows_know_their_source_and_place():
    mixed = mix([("one", rows(2)), ("two", Rows("b.parquet", [{"m": 1}], [1])), ("three", rows(1, "c.jsonl"))])
    assert (mixed.name, mixed.numbers) == ("one and 2 more", [1, 2, 3, 4])
    assert mixed.sources == ["one", "one", "two", "three"]
    assert [mixed.where(index) for index in range(4)] == ["a.jsonl:2", "a.jsonl:4", "b.parquet: row 1", "c.jsonl:2"]
    assert mixed.columns == ["n", "m"]
    part = mixed.take([3, 0])
    assert (part.sources, part.where(0), part.numbers) == (["three", "one"], "c.jsonl:2", [4, 1])
    assert mix([("one", rows(2))]).name == "one"


def test_rows_set_apart_are_not_left():
    apart, left = set_apart(rows(10), count=3, seed=2)
    assert len(apart) == 3 and sorted(apart.numbers + left.numbers) == list(range(1, 11))
    apart, left = set_apart(repeat(rows(4), weight=2, seed=0), count=1, seed=0)
    assert len(left) == 6 and apart.numbers[0] not in left.numbers  # its copies are gone too
    with pytest.raises(DataError) as caught:
        set_apart(rows(3), count=3, seed=0)
    assert str(caught.value) == "a.jsonl: 3 solved rows for prompts leave none of 3 to train on"


def test_split_off_is_a_partition_that_the_seed_decides():
    whole = rows(10)
    train, validation = split_off(whole, fraction=0.3, seed=1)
    assert len(validation) == 3 and sorted(train.numbers + validation.numbers) == whole.numbers
    assert train.numbers == sorted(train.numbers) and validation.lines == [2 * n for n in validation.numbers]
    assert split_off(whole, fraction=0.3, seed=1)[1].numbers == validation.numbers
    assert any(split_off(whole, fraction=0.3, seed=seed)[1].numbers != validation.numbers for seed in range(5))
    assert len(split_off(whole, fraction=0.001, seed=0)[1]) == 1


def test_one_row_cannot_be_split():
    with pytest.raises(DataError) as caught:
        split_off(rows(1), fraction=0.1, seed=0)
    assert str(caught.value) == (
        "a.jsonl: 1 row cannot be split into training rows and a validation fraction of 0.1; "
        "give data.validation rows of its own"
    )
