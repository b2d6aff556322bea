"""Columns of examples: they give back what they were made of, and hold it in a few bytes a token."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reft_cli.data.examples import Example, Examples, ranges

TEXTS = st.text(st.characters(), max_size=8)  # halves of surrogate pairs too
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=12)


@st.composite
def examples(draw):
    label = draw(st.sampled_from([st.none(), st.integers(-5, 2**40), st.floats(allow_nan=False)]))
    typed = draw(st.booleans())
    made = []
    for row in range(1, draw(st.integers(0, 6)) + 1):
        ids = draw(IDS.filter(len)) if typed else draw(IDS)
        types = [draw(st.integers(0, 1)) for _ in ids] if typed else None
        prompt = draw(st.integers(0, len(ids)))
        reference, source = draw(st.none() | TEXTS), draw(TEXTS)
        made.append(Example(ids, prompt, draw(label), draw(TEXTS), draw(TEXTS), 3 * row, types, reference, source))
    return made


@st.composite
def pairs(draw):
    label = draw(st.sampled_from([None, 1]))
    made = []
    for row in range(1, draw(st.integers(0, 6)) + 1):
        ids, other = draw(IDS), draw(IDS)
        one = Example(ids, draw(st.integers(0, len(ids))), label, draw(TEXTS), draw(TEXTS), row)
        second = replace(
            one,
            input_ids=other,
            prompt_length=draw(st.integers(0, len(other))),
            completion=draw(TEXTS),
            label=None if label is None else 0,
        )
        made.append(replace(one, rejected=second))
    return made


@given(examples() | pairs(), st.randoms())
def test_columns_give_back_each_example(given_ones, random):
    columns = Examples.of(given_ones)
    assert list(columns) == given_ones and columns == given_ones
    assert [columns[index] for index in range(-len(given_ones), 0)] == given_ones
    assert columns[1:5:2] == given_ones[1:5:2]
    order = random.sample(range(len(given_ones)), len(given_ones))
    assert columns.take(order) == [given_ones[index] for index in order]
    assert Examples.from_columns(columns.columns()) == given_ones
    assert columns.lengths.tolist() == [len(each.input_ids) for each in given_ones]
    assert columns.learned.tolist() == [each.learned for each in given_ones]
    short = [
        replace(each, input_ids=each.input_ids[:5], token_types=each.token_types and each.token_types[:5])
        for each in given_ones
    ]
    assert [each.input_ids for each in columns.cut_at(5)] == [each.input_ids for each in short]
    assert columns.longest_first() == sorted(given_ones, key=lambda each: (-each.size, each.row))
    assert columns.longest.tolist() == [each.longest for each in given_ones]
    assert columns.sizes.tolist() == [each.size for each in given_ones]


@given(pairs())
def test_sequences_of_pairs_are_the_chosen_ones_and_then_the_rejected_ones(given_ones):
    columns = Examples.of(given_ones)
    if not given_ones:
        return
    sides = [*given_ones, *(each.rejected for each in given_ones)]
    found = columns.sequences()
    assert found.tokens is columns.tokens and found.rejected is None
    for sequence, side in zip(found, sides, strict=True):
        assert (sequence.input_ids, sequence.prompt_length) == (side.input_ids, side.prompt_length)
        assert (sequence.label, sequence.row) == (side.label, side.row)
    assert columns.token_count == sum(len(side.input_ids) for side in sides)
    assert [each.rejected.input_ids for each in columns.cut_at(3)] == [
        each.rejected.input_ids[:3] for each in given_ones
    ]


def test_sequences_of_others_are_themselves():
    columns = Examples.of([Example([1, 2], 1, None, "a", "b", 1)])
    assert columns.sequences() is columns and columns.token_count == 2


def test_a_generator_is_read_once_and_columns_are_taken_as_they_are():
    columns = Examples.of(Example([row] * 3, 1, None, "a", "b", row) for row in range(1, 6))
    assert Examples.of(columns) is columns
    assert columns.take([4, 0]).tokens is columns.tokens


def test_a_token_takes_four_bytes():
    columns = Examples.of(Example(list(range(300)), 200, None, "", "", row) for row in range(1, 1001))
    assert sum(column.nbytes for column in columns.columns().values()) <= 1000 * (4 * 300 + 96)


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 9)), max_size=9))
def test_ranges_are_those_of_python(spans):
    starts, stops = np.array([(start, start + count) for start, count in spans], dtype=np.int64).reshape(-1, 2).T
    expected = [number for start, count in spans for number in range(start, start + count)]
    assert ranges(starts, stops).tolist() == expected
