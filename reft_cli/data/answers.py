"""Rows with answers in words as examples: one sequence a row, or a pair of a chosen and a rejected answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reft_cli.data.examples import Example, Examples
from reft_cli.data.formats import Format
from reft_cli.data.templates import Template
from reft_cli.data.tokens import Cut, TextTokenizer
from reft_cli.errors import DataError

CHUNK = 1024  # rows tokenized at once: enough for the tokenizer's threads, small enough to keep offsets off the memory


@dataclass(frozen=True)
class Answered:
    """Examples in the order of their rows, and the numbers of the rows whose boundary is not clean (see `Counts`)."""

    examples: Examples
    spanning: list[int]
    differing: list[int]


@dataclass(frozen=True)
class Ending:
    """What comes after an answer: the end of the sequence, if wanted, and the tokenizer's own last tokens."""

    eos: int | None
    closing: tuple[int, ...] = ()

    @classmethod
    def of(cls, text: TextTokenizer, *, append_eos: bool, rated: bool) -> Ending:
        """Of an answer that is written, or `rated` as a whole by a head."""
        if not rated:
            return cls(text.eos_token_id if append_eos else None)
        return cls(text.eos_token_id if append_eos and not text.suffix else None, tuple(text.suffix))


def answered(
    fields: Sequence[Mapping[str, Any]],
    numbers: Sequence[int],
    places: Sequence[str],
    *,
    text: TextTokenizer,
    template: Template,
    ending: Ending,
) -> Answered:
    """Each row's prompt and answer as one sequence."""
    prompts = [template.render_prompt(each, where=where) for each, where in zip(fields, places, strict=True)]
    answers = [template.render_completion(each, where=where) for each, where in zip(fields, places, strict=True)]
    truths = [template.render_reference(each, where=where) for each, where in zip(fields, places, strict=True)]
    prefix = text.prefix if template.special_tokens else []
    closing = ending.closing if template.special_tokens else ()
    end = ending.eos
    spanning: list[int] = []
    differing: list[int] = []

    def examples() -> Iterator[Example]:
        cuts = _cuts(text, prompts, answers)
        for cut, prompt, answer, truth, row in zip(cuts, prompts, answers, truths, numbers, strict=True):
            ids = prefix + cut.ids
            ended = end in cut.ids[cut.boundary :] if not template.special_tokens else cut.ids[-1:] == [end]
            if end is not None and not ended:
                ids.append(end)
            ids += closing
            if cut.spans:
                spanning.append(row)
            elif cut.differs:
                differing.append(row)
            yield Example(ids, len(prefix) + cut.boundary, None, prompt, answer, row, reference=truth)

    return Answered(Examples.of(examples()), spanning, differing)


def paired(
    fields: Sequence[Mapping[str, Any]],
    numbers: Sequence[int],
    places: Sequence[str],
    *,
    name: str,
    data_format: Format,
    text: TextTokenizer,
    template: Template,
    ending: Ending,
    labelled: bool,
) -> Answered:
    """Each row as a pair; where its two answers are lists, as a pair for each two of them.

    The rejected answer is written by the same template, in the place of the chosen one. `labelled`: 1 and 0 go along.
    DataError: an answer is empty, or no row has two different ones.
    """
    split = [data_format.split(each, where=where) for each, where in zip(fields, places, strict=True)]
    pairs = [pair for each in split for pair in each]
    numbers = [number for number, each in zip(numbers, split, strict=True) for _ in each]
    places = [place for place, each in zip(places, split, strict=True) for _ in each]
    chosen, rejected = (
        answered(side, numbers, places, text=text, template=template, ending=ending)
        for side in (pairs, [data_format.rejected_first(pair) for pair in pairs])
    )
    for side in (chosen, rejected):
        refuse_empty(side.examples, name=name, eos=ending.eos)
    label = 1 if labelled else None
    examples = Examples.of(
        replace(one, rejected=replace(other, reference=one.reference), label=label)
        for one, other in zip(chosen.examples, rejected.examples, strict=True)
    )
    if all(each.rejected is not None and each.completion == each.rejected.completion for each in examples):
        raise DataError(
            f"{name}: the two answers of every row are the same text; data.template.completion has to use "
            f"{{{data_format.answer}}}, in whose place the rejected answer is put"
        )
    spanning = sorted({*chosen.spanning, *rejected.spanning})
    return Answered(examples, spanning, sorted({*chosen.differing, *rejected.differing}))


def refuse_empty(examples: Examples, *, name: str, eos: int | None) -> None:
    """DataError if rows have nothing to learn but the end of the sequence."""
    nothing = examples.learned < 1
    if eos is not None:
        last = examples.tokens[examples.spans[:, 1] - 1]
        nothing |= (examples.lengths - examples.prompt_lengths == 1) & (last == eos)
    empty = examples.rows[nothing].tolist()
    if empty:
        rows = "1 row has" if len(empty) == 1 else f"{len(empty):,} rows have"
        raise DataError(
            f"{name}: {rows} no token to learn from (answer empty, first: row {empty[0]}). "
            + ("Training on them gives loss 0 or NaN." if eos is None else "Training on them teaches to say nothing.")
        )


def _cuts(text: TextTokenizer, prompts: Sequence[str], answers: Sequence[str]) -> Iterator[Cut]:
    for start in range(0, len(prompts), CHUNK):
        chunk = slice(start, start + CHUNK)
        yield from text.cut(prompts[chunk], answers[chunk])
