"""Rows and prompts that a model has no positions for are named before anything is computed."""

from __future__ import annotations

import pytest

from reft_cli.data.encode import Example
from reft_cli.data.fitting import check_fits
from reft_cli.errors import DataError
from tiny_models import base_of


def example(prompt: int, answer: int, *, row: int) -> Example:
    return Example([5] * (prompt + answer), prompt, None, "", "", row)


@pytest.mark.parametrize(
    ("prompt", "answer", "new", "said"),
    [
        (100, 28, 28, None),
        (
            100,
            29,
            0,
            "takes 129 tokens, and the model has learned 128 positions; shorten it, or set data.max_length: 128",
        ),
        (120, 1, 9, "takes 120 tokens for its prompt and up to 9 for its answer, .*; allow 8 with max_new_tokens"),
        (129, 0, 9, "takes 129 tokens"),
    ],
)
def test_the_longest_row_is_named(prompt: int, answer: int, new: int, said: str | None):
    examples = [example(3, 2, row=1), example(prompt, answer, row=2), example(4, 2, row=3)]
    check_fits(examples, base_of("llama").model, name="x.jsonl: row", new_tokens=10_000)
    if said is None:
        check_fits(examples, base_of("gpt2").model, name="x.jsonl: row", new_tokens=new)
        return
    with pytest.raises(DataError, match=f"^x.jsonl: row 2: {said}"):
        check_fits(examples, base_of("gpt2").model, name="x.jsonl: row", new_tokens=new)


def test_nothing_fits():
    check_fits([], base_of("gpt2").model, name="row", new_tokens=999)
