"""Rows with more tokens than `data.max_length`: refused, left out, or cut, so that the edited tokens stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from reft_cli.data.examples import Example, Examples
from reft_cli.errors import DataError, Problem
from reft_cli.kinds import Overflow
from reft_cli.positions import Positions


def fit(
    examples: Sequence[Example],
    *,
    max_length: int,
    on_overflow: Overflow,
    positions: Positions,
    special: tuple[int, int] = (0, 0),
    name: str,
) -> tuple[Examples, list[int], list[int]]:
    """(examples of at most `max_length` tokens, rows dropped, rows cut); DataError for `on_overflow` error.

    A cut leaves the edited tokens of the prompt and the `special` ones before and after it.
    """
    columns = Examples.of(examples)
    over = columns.longest > max_length
    long = columns.take(np.flatnonzero(over))
    if not long:
        return columns, [], []
    if on_overflow == "truncate_answer":
        return _ends_cut(columns, max_length=max_length, name=name)
    first, last = max(positions.first, special[0]), max(positions.last, special[1])
    shortened = [cut_middle(example, max_length=max_length, first=first, last=last) for example in long]
    hopeless = [example for example, cut in zip(long, shortened, strict=True) if cut is None]
    if on_overflow == "error" or (on_overflow == "truncate_prompt" and hopeless):
        raise _too_long(
            long if on_overflow == "error" else hopeless,
            hopeless,
            read=len(columns),
            max_length=max_length,
            positions=positions,
            name=name,
        )
    if on_overflow == "drop":
        kept = columns.take(np.flatnonzero(~over))
        _refuse_none(kept, name=name, max_length=max_length)
        return kept, long.rows.tolist(), []
    cuts = iter(shortened)
    fitting = ((next(cuts) if is_over else example) or example for example, is_over in zip(columns, over, strict=True))
    return Examples.of(fitting), [], long.rows.tolist()


def _ends_cut(examples: Examples, *, max_length: int, name: str) -> tuple[Examples, list[int], list[int]]:
    """As pyreft has it: the end of an answer goes, and its end token with it; a prompt that fills all is left out."""
    over = examples.lengths > max_length
    filled = over & (np.maximum(examples.longest_prompts, 1) >= max_length)
    kept = examples.take(np.flatnonzero(~filled)).cut_at(max_length)
    _refuse_none(kept, name=name, max_length=max_length)
    return kept, examples.rows[filled].tolist(), examples.rows[over & ~filled].tolist()


def _refuse_none(kept: Examples, *, name: str, max_length: int) -> None:
    if not kept:
        raise DataError(f"{name}: every row is longer than data.max_length {max_length}; none is left to use")


def cut_middle(example: Example, *, max_length: int, first: int, last: int) -> Example | None:
    """The example with tokens taken out of the middle of its prompt, of which the `first` and `last` tokens stay.

    What else fits is divided evenly between the two ends. None if there is no room for those tokens and the answer, of
    a pair the longer one: both keep the same prompt.
    """
    other = example.rejected
    budget = max_length - max(len(each.input_ids) - each.prompt_length for each in (example, other) if each is not None)
    if budget < max(first + last, 1):
        return None
    cut = _with_prompt_of(example, budget, first=first, last=last)
    return cut if other is None else replace(cut, rejected=_with_prompt_of(other, budget, first=first, last=last))


def _with_prompt_of(example: Example, budget: int, *, first: int, last: int) -> Example:
    budget = min(budget, example.prompt_length)
    head = min(max(first, budget - budget // 2), budget - last)
    skipped = slice(head, example.prompt_length - (budget - head))
    ids, types = list(example.input_ids), example.token_types
    del ids[skipped]
    if types is not None:
        types = list(types)
        del types[skipped]
    return replace(example, input_ids=ids, prompt_length=budget, token_types=types)


def _too_long(
    long: Sequence[Example],
    hopeless: Sequence[Example],
    *,
    read: int,
    max_length: int,
    positions: Positions,
    name: str,
) -> DataError:
    worst = max(long, key=lambda example: example.longest)
    size = worst.longest
    are = "1 of {:,} rows is" if len(long) == 1 else f"{len(long):,} of {{:,}} rows are"
    message = (
        f"{are.format(read)} longer than data.max_length {max_length} "
        f"(longest: row {worst.row}, {size:,} tokens). Nothing was dropped."
    )
    if hopeless:
        first = hopeless[0]
        answer = first.longest - first.prompt_length
        remedy = (
            f"or data.on_overflow: drop (truncate_prompt does not help: row {first.row} has an answer of "
            f"{answer:,} tokens, which leaves too few for the edited tokens of its prompt)."
        )
    else:
        stay = f"{positions} tokens stay" if positions.shortest_whole_prompt else "both ends stay"
        remedy = f"or data.on_overflow: drop, or truncate_prompt (cuts the middle of the prompt; {stay})."
    return DataError(Problem(message, file=name, hint=f"Set data.max_length: {size}, {remedy}"))
