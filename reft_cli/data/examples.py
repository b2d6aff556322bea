"""Examples: rows as tokens, one by one, and as columns that hold a million of them in a few arrays.

Shapes: E examples, N tokens of all of them, C bytes of their texts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
TEXTS = ("prompt", "completion", "reference", "source")  # the fields of an example that are text, or None


@dataclass(frozen=True, slots=True)
class Example:
    """One row as tokens. The first `prompt_length` are the prompt, what follows is learned; `row` counts from 1.

    `reference` is what an answer is scored against where it is not the completion, `source` the name of the row's
    source where rows come from several.
    """

    input_ids: list[int]
    prompt_length: int
    label: int | float | None
    prompt: str
    completion: str
    row: int
    token_types: list[int] | None = None
    reference: str | None = None
    source: str = ""

    @property
    def learned(self) -> int:
        """Tokens with a loss; the first token of a sequence is predicted from nothing."""
        return len(self.input_ids) - max(self.prompt_length, 1)


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """Examples as columns: 4 bytes a token and 96 an example besides their texts; an `Example` is made when asked for.

    `spans` [E, 2] are each one's first token and the end of its tokens in `tokens` [N] (and `token_types` [N]);
    `text_spans` [E, 2 TEXTS] are the beginning and end of each text in `text` [C], UTF-8, or -1 for None. `take` shares
    tokens and text.
    """

    tokens: NDArray[np.int32]
    spans: Ints
    prompt_lengths: Ints
    rows: Ints
    text: NDArray[np.uint8]
    text_spans: Ints
    labels: Ints | NDArray[np.float64] | None = None
    token_types: NDArray[np.int8] | None = None

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Examples:
        """Columns of examples, in their order; they are read once, so that a generator never holds them all."""
        if isinstance(examples, Examples):
            return examples
        tokens, types, text = array("i"), array("b"), bytearray()
        ends, marks, prompts, rows, labels = array("q", [0]), array("q"), array("q"), array("q"), []
        for each in examples:
            tokens.extend(each.input_ids)
            ends.append(len(tokens))
            types.extend(each.token_types or ())
            for part in (getattr(each, name) for name in TEXTS):
                marks.append(-1 if part is None else len(text))
                text += b"" if part is None else part.encode("utf-8", "surrogatepass")
                marks.append(-1 if part is None else len(text))
            prompts.append(each.prompt_length)
            rows.append(each.row)
            labels.append(each.label)
        known = [label for label in labels if label is not None]
        assert len(known) in (0, len(labels)), "all examples have a label or none has"
        bounds = np.array(ends, dtype=np.int64)
        return cls(
            tokens=np.array(tokens, dtype=np.int32),
            spans=np.stack([bounds[:-1], bounds[1:]], axis=1),
            prompt_lengths=np.array(prompts, dtype=np.int64),
            rows=np.array(rows, dtype=np.int64),
            text=np.frombuffer(bytes(text), dtype=np.uint8),
            text_spans=np.array(marks, dtype=np.int64).reshape(-1, 2 * len(TEXTS)),
            labels=_label_column(known),
            token_types=np.array(types, dtype=np.int8) if types else None,
        )

    @classmethod
    def from_columns(cls, columns: Mapping[str, NDArray[np.generic]]) -> Self:
        """The inverse of `columns`. TypeError: one is missing or unknown."""
        return cls(**columns)  # type: ignore[arg-type]  # the names are the fields'; a wrong one is the TypeError

    def columns(self) -> dict[str, NDArray[np.generic]]:
        """The arrays by name, those that are there."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: column for name, column in found.items() if column is not None}

    @property
    def lengths(self) -> Ints:
        """Tokens of each example, [E]."""
        found: Ints = self.spans[:, 1] - self.spans[:, 0]
        return found

    @property
    def learned(self) -> Ints:
        """Tokens with a loss of each example, [E]."""
        found: Ints = self.lengths - np.maximum(self.prompt_lengths, 1)
        return found

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Examples: ...

    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        start, stop = self.spans[index].tolist()
        marks = self.text_spans[index].tolist()
        texts: dict[str, Any] = {name: self._text(*marks[2 * at : 2 * at + 2]) for at, name in enumerate(TEXTS)}
        return Example(
            input_ids=self.tokens[start:stop].tolist(),
            prompt_length=int(self.prompt_lengths[index]),
            label=None if self.labels is None else self.labels[index].item(),
            row=int(self.rows[index]),
            token_types=None if self.token_types is None else self.token_types[start:stop].tolist(),
            **texts,
        )

    def _text(self, start: int, stop: int) -> str | None:
        return None if start < 0 else self.text[start:stop].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # columns cannot be hashed

    def take(self, indices: Sequence[int] | Ints) -> Examples:
        """Some of the examples, in the order of the indices."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Examples(
            tokens=self.tokens,
            spans=self.spans[chosen],
            prompt_lengths=self.prompt_lengths[chosen],
            rows=self.rows[chosen],
            text=self.text,
            text_spans=self.text_spans[chosen],
            labels=None if self.labels is None else self.labels[chosen],
            token_types=self.token_types,
        )

    def cut_at(self, length: int) -> Examples:
        """The examples with at most their first `length` tokens, which they share."""
        ends = np.minimum(self.spans[:, 1], self.spans[:, 0] + length)
        return replace(self, spans=np.stack([self.spans[:, 0], ends], axis=1))

    def longest_first(self) -> Examples:
        """The examples by falling length, those of one length by their row."""
        return self.take(np.lexsort((self.rows, -self.lengths)))


def ranges(starts: Ints, stops: Ints) -> Ints:
    """The numbers of every half-open range [starts[i], stops[i]), one range after the other."""
    counts = stops - starts
    before = np.cumsum(counts) - counts
    numbers: Ints = np.repeat(starts - before, counts) + np.arange(counts.sum(), dtype=np.int64)
    return numbers


def _label_column(labels: Sequence[int | float]) -> Ints | NDArray[np.float64] | None:
    if not labels:
        return None
    return np.array(labels, dtype=np.float64) if isinstance(labels[0], float) else np.array(labels, dtype=np.int64)
