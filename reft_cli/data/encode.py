"""Rows to examples: token ids with a known end of the prompt, and a label where the task has one.

Everything here is a pure function of its arguments. Batches and tensors are elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import tokenizers

from reft_cli import __version__
from reft_cli.data.answers import Answered, Ending, answered, paired, refuse_empty
from reft_cli.data.examples import Example as Example  # what encoding gives, so it may be had from here too
from reft_cli.data.examples import Examples
from reft_cli.data.formats import Format
from reft_cli.data.labels import class_number, find_classes, number
from reft_cli.data.overflow import fit
from reft_cli.data.records import Rows
from reft_cli.data.templates import Template
from reft_cli.data.tokens import TextTokenizer, text_tokenizer
from reft_cli.errors import DataError, Problem, SpecError
from reft_cli.kinds import ANSWERED, PAIRED, WRITING, Overflow, TaskKind
from reft_cli.positions import Positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 3  # raise it whenever the same rows would give other examples, because of a change anywhere in reft_cli.data


@dataclass(frozen=True)
class Notice:
    """Rows to which something happened: how many, and the number of the first."""

    count: int = 0
    first: int | None = None


@dataclass(frozen=True)
class Counts:
    """What became of the rows.

    spanning: a token lies in prompt and answer; it is the answer's. differing: no such token, and still the prompt
    alone has other tokens than in its row. Either way training and inference see different prompts.
    """

    read: int
    used: int
    dropped: Notice = Notice()
    cut: Notice = Notice()
    spanning: Notice = Notice()
    differing: Notice = Notice()


@dataclass(frozen=True)
class Encoded:
    """Examples in the order of the rows; `classes` are the names of the class numbers."""

    name: str
    examples: Sequence[Example]
    counts: Counts
    classes: tuple[str, ...] | None = None


def encode_examples(
    rows: Rows,
    *,
    tokenizer: PreTrainedTokenizerBase,
    data_format: Format,
    template: Template,
    task_kind: TaskKind,
    positions: Positions,
    max_length: int,
    on_overflow: Overflow = "error",
    append_eos: bool = True,
    classes: Sequence[str] | None = None,
    classes_given: bool = False,
) -> Encoded:
    """All rows as examples with answers or labels.

    `classes`: names in the order of their numbers; found in these rows if None. `classes_given`: they were written by
    the user, so that a label may also be a number. DataError names the row at fault.
    """
    text = text_tokenizer(tokenizer)
    if append_eos and text.eos_token_id is None and task_kind in WRITING:
        raise SpecError(
            Problem(f"{text.name} has no end-of-sequence token to append; write false", key="data.append_eos")
        )
    fields = [data_format.fields_of(row, where=rows.where(index)) for index, row in enumerate(rows.rows)]
    known = None
    if task_kind in ANSWERED:
        made = _with_answers(
            rows, fields, data_format=data_format, text=text, template=template, kind=task_kind, append_eos=append_eos
        )
    else:
        labels, known = _labels(rows, fields, kind=task_kind, classes=classes, given=classes_given)
        prompts = _prompts(fields, rows.numbers, text=text, template=template, whole=True, places=_places(rows))
        labelled = (replace(prompt, label=label) for prompt, label in zip(prompts, labels, strict=True))
        made = Answered(Examples.of(labelled), [], [])
    examples = made.examples
    if rows.sources is not None:
        named = dict(zip(rows.numbers, rows.sources, strict=True))
        examples = Examples.of(replace(each, source=named[each.row]) for each in examples)
    kept, dropped, cut = fit(
        examples,
        special=(len(text.prefix), 0 if task_kind in ANSWERED else len(text.suffix)),
        max_length=max_length,
        on_overflow=on_overflow,
        positions=positions,
        name=rows.name,
    )
    counts = Counts(
        read=len(rows),
        used=len(kept),
        dropped=notice(dropped),
        cut=notice(cut),
        spanning=notice(made.spanning),
        differing=notice(made.differing),
    )
    return Encoded(rows.name, kept, counts, known)


def encode_prompts(
    fields: Sequence[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    task_kind: TaskKind = "causal_lm",
    append_eos: bool = True,
) -> list[Example]:
    """Prompts without answers, with the ids that they have in training; messages call them `prompt 1` and so on.

    A reward is of an answer, so that there the rows have one.
    """
    text, numbers = text_tokenizer(tokenizer), range(1, len(fields) + 1)
    places = [f"prompt {index}" for index in numbers]
    if task_kind == "reward":
        ending = Ending.of(text, append_eos=append_eos, rated=True)
        made = answered(fields, numbers, places, text=text, template=template, ending=ending)
        return [replace(each, label=1) for each in made.examples]
    return _prompts(fields, numbers, text=text, template=template, whole=task_kind not in WRITING, places=places)


def fingerprint(
    rows: Rows,
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    data_format: Format,
    settings: Mapping[str, Any],
) -> str:
    """SHA-256 of everything that examples depend on; `settings` are the other arguments of `encode_examples`.

    The first row as rendered is part of it: a chat template may write today's date. DataError: it cannot be rendered.
    """
    place = rows.where(0)
    first = data_format.single(data_format.fields_of(rows.rows[0], where=place), where=place)
    parts = {
        "version": (VERSION, __version__, tokenizers.__version__),
        "rows": rows.fingerprint,
        "numbers": hashlib.sha256(array("q", rows.numbers).tobytes()).hexdigest(),
        "sources": rows.sources,
        "tokenizer": text_tokenizer(tokenizer).fingerprint,
        "template": template.to_dict(),
        "rendered": (template.render_prompt(first, where=place), template.render_completion(first, where=place)),
        "format": data_format.to_dict(),
        "settings": dict(settings),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def notice(rows: Sequence[int]) -> Notice:
    """Count and first of row numbers."""
    return Notice(len(rows), rows[0] if rows else None)


def _prompts(
    fields: Sequence[Mapping[str, Any]],
    numbers: Sequence[int],
    *,
    text: TextTokenizer,
    template: Template,
    whole: bool,
    places: Sequence[str],
) -> list[Example]:
    """Examples that are all prompt; `whole`: with every special token, as classifiers read them."""
    prompts = [template.render_prompt(each, where=where) for each, where in zip(fields, places, strict=True)]
    types: Sequence[list[int] | None] | None = None
    if whole and template.special_tokens:
        pairs = [template.render_pair(each, where=where) for each, where in zip(fields, places, strict=True)]
        second = [pair for pair in pairs if pair is not None]
        ids, types = text.whole(prompts, second or None)
    else:
        prefix = text.prefix if template.special_tokens else []
        ids = [prefix + each for each in text.ids(prompts)]
    if [] in ids:
        raise DataError(f"{places[ids.index([])]}: the prompt is empty and has no token")
    return [
        Example(each, len(each), None, prompt, "", row, kind)
        for each, prompt, row, kind in zip(ids, prompts, numbers, types or [None] * len(ids), strict=True)
    ]


def _with_answers(
    rows: Rows,
    fields: Sequence[Mapping[str, Any]],
    *,
    data_format: Format,
    text: TextTokenizer,
    template: Template,
    kind: TaskKind,
    append_eos: bool,
) -> Answered:
    """Rows of a kind of task that has answers in words."""
    places = _places(rows)
    ending = Ending.of(text, append_eos=append_eos, rated=kind == "reward")
    if kind in PAIRED:
        return paired(
            fields,
            rows.numbers,
            places,
            name=rows.name,
            data_format=data_format,
            text=text,
            template=template,
            ending=ending,
            labelled=kind == "reward",
        )
    made = answered(fields, rows.numbers, places, text=text, template=template, ending=ending)
    refuse_empty(made.examples, name=rows.name, eos=ending.eos)
    return made


def _labels(
    rows: Rows, fields: Sequence[Mapping[str, Any]], *, kind: TaskKind, classes: Sequence[str] | None, given: bool
) -> tuple[Sequence[int | float], tuple[str, ...] | None]:
    """(labels, names of the classes or None for a regression)."""
    places = _places(rows)
    for each, where in zip(fields, places, strict=True):
        if "label" not in each:
            raise DataError(f"{where}: no column `label`, which task.kind {kind} needs; there are {', '.join(each)}")
    values = [each["label"] for each in fields]
    if kind == "regression":
        return [number(value, where=where) for value, where in zip(values, places, strict=True)], None
    known = tuple(classes) if classes is not None else find_classes(values, places=places, name=rows.name)
    return [
        class_number(value, known, where=where, given=given) for value, where in zip(values, places, strict=True)
    ], known


def _places(rows: Rows) -> list[str]:
    return [rows.where(index) for index in range(len(rows))]
