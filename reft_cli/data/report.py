"""What `reft check` says about data: counts, lengths, warnings, and one row token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reft_cli.data.encode import Counts, Encoded, Notice, notice
from reft_cli.data.examples import Example, Examples, Ints
from reft_cli.positions import PositionGroup, Positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Lengths:
    """Token counts over rows."""

    p50: int
    p95: int
    max: int


@dataclass(frozen=True)
class DataReport:
    """One encoded set of rows."""

    name: str
    counts: Counts
    prompt: Lengths
    answer: Lengths
    total: Lengths
    tokens: int
    """Tokens of all rows together."""
    positions: str
    whole_prompt: int
    """The shortest prompt in which every position exists once."""
    short: Notice
    """Prompts shorter than that."""
    labels: dict[str, int]
    """Rows of each class."""
    learned: Notice
    """Rows that are scored and stand among the training rows too, prompt and answer."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for --json."""
        return asdict(self) | {"warnings": self.warnings}

    @property
    def warnings(self) -> list[str]:
        """One sentence for everything that a user should know before training."""
        counts, total = self.counts, self.counts.read
        texts = [
            (counts.dropped, "{rows} dropped as too long"),
            (counts.cut, "{rows} cut as too long"),
            (
                counts.spanning,
                "{rows} with a token that spans prompt and answer: end the prompt without a trailing space and start "
                "the answer with one",
            ),
            (counts.differing, "{rows} with other prompt tokens than the same prompt has without its answer"),
            (self.learned, "{rows} stand among the training rows too"),
            (self.short, f"{{rows}} with a prompt of fewer than {self.whole_prompt} tokens for {self.positions}"),
        ]
        return [
            f"{self.name}: {text.format(rows=_rows(noted, total))} (first: row {noted.first})"
            for noted, text in texts
            if noted.count
        ]


@dataclass(frozen=True)
class Token:
    """One token of a row: its text, and what it is for. `groups` are names of position groups that edit it."""

    text: str
    is_prompt: bool
    is_answer: bool
    groups: tuple[str, ...]


def report(encoded: Encoded, *, positions: Positions, training: Encoded | None = None) -> DataReport:
    """Count an encoded set; `training` is the one that is learned from, where this one is scored."""
    examples, need = Examples.of(encoded.examples), positions.shortest_whole_prompt
    counts = [0] * len(encoded.classes or ())
    if encoded.classes and examples.labels is not None:
        counts = np.bincount(examples.labels.astype(np.int64), minlength=len(encoded.classes)).tolist()
    return DataReport(
        name=encoded.name,
        counts=encoded.counts,
        prompt=_lengths(examples.prompt_lengths),
        answer=_lengths(examples.lengths - examples.prompt_lengths),
        total=_lengths(examples.longest),
        tokens=examples.token_count,
        positions=str(positions),
        whole_prompt=need,
        short=notice(examples.rows[examples.prompt_lengths < need].tolist()),
        learned=_learned(examples, training),
        labels=dict(zip(encoded.classes or (), counts, strict=True)),
    )


def _learned(examples: Examples, training: Encoded | None) -> Notice:
    if training is None:
        return Notice()
    known = set(Examples.of(training.examples).written())
    return notice([row for row, each in zip(examples.rows.tolist(), examples.written(), strict=True) if each in known])


def render_row(example: Example, *, tokenizer: PreTrainedTokenizerBase, groups: Sequence[PositionGroup]) -> list[Token]:
    """The tokens of an example; a character of several tokens stands at the last of them."""
    edited = {group.name: set(group.indices(example.prompt_length, len(example.input_ids))) for group in groups}
    texts = _texts(example.input_ids, tokenizer)
    return [
        Token(
            text=text,
            is_prompt=index < example.prompt_length,
            is_answer=index >= example.prompt_length,
            groups=tuple(name for name, indices in edited.items() if index in indices),
        )
        for index, text in enumerate(texts)
    ]


def _texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    texts, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        unfinished = text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids)
        texts.append("" if unfinished else text[len(shown) :])
        shown = shown if unfinished else text
    return texts


def _lengths(values: Ints) -> Lengths:
    """Nearest-rank percentiles."""
    ordered = np.sort(values).tolist()
    return Lengths(*(ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95, 1)))


def _rows(noted: Notice, total: int) -> str:
    return f"{noted.count:,} of {total:,} rows"
