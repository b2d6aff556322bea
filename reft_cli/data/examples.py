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
PAIR = 5  # numbers that a pair has besides


@dataclass(frozen=True, slots=True)
class Example:
    """One row as tokens. The first `prompt_length` are the prompt, what follows is learned; `row` counts from 1.

    `reference` is what an answer is scored against where it is not the completion, `source` the name of the row's
    source where rows come from several. `rejected` makes it a pair: the same prompt with an answer that is not wanted.
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
    rejected: Example | None = None

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence."""
        return max(len(self.input_ids), 0 if self.rejected is None else len(self.rejected.input_ids))

    @property
    def size(self) -> int:
        """Tokens that it takes in a padded batch by itself; a pair is two sequences."""
        return self.longest if self.rejected is None else 2 * self.longest

    @property
    def learned(self) -> int:
        """Tokens with a loss; the first token of a sequence is predicted from nothing."""
        return len(self.input_ids) - max(self.prompt_length, 1)


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """Examples as columns: 4 bytes a token and 96 an example besides their texts; an `Example` is made when asked for.

    `spans` [E, 2] are each one's first token and the end of its tokens in `tokens` [N] (and `token_types` [N]);
    `text_spans` [E, 2 TEXTS] are the beginning and end of each text in `text` [C], UTF-8, or -1 for None. `take` shares
    tokens and text. Of pairs, `rejected` [E, 5] are the first token of the rejected sequence, the end of its tokens,
    the tokens of its prompt, and the beginning and end of its completion in `text`.
    """

    tokens: NDArray[np.int32]
    spans: Ints
    prompt_lengths: Ints
    rows: Ints
    text: NDArray[np.uint8]
    text_spans: Ints
    labels: Ints | NDArray[np.float64] | None = None
    token_types: NDArray[np.int8] | None = None
    rejected: Ints | None = None

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Examples:
        """Columns of examples, in their order; they are read once, so that a generator never holds them all."""
        if isinstance(examples, Examples):
            return examples
        tokens, types, text = array("i"), array("b"), bytearray()
        spans, marks, prompts, rows, pairs = (array("q") for _ in range(5))
        labels: list[int | float | None] = []
        for each in examples:
            spans.extend(_appended(tokens, each.input_ids))
            types.extend(each.token_types or ())
            for part in (getattr(each, name) for name in TEXTS):
                marks.extend(_written(text, part))
            prompts.append(each.prompt_length)
            rows.append(each.row)
            labels.append(each.label)
            if (other := each.rejected) is not None:
                pairs.extend((*_appended(tokens, other.input_ids), other.prompt_length))
                pairs.extend(_written(text, other.completion))
        known = [label for label in labels if label is not None]
        assert len(known) in (0, len(labels)), "all examples have a label or none has"
        assert len(pairs) in (0, PAIR * len(rows)), "all examples are pairs or none is"
        return cls(
            tokens=np.array(tokens, dtype=np.int32),
            spans=np.array(spans, dtype=np.int64).reshape(-1, 2),
            prompt_lengths=np.array(prompts, dtype=np.int64),
            rows=np.array(rows, dtype=np.int64),
            text=np.frombuffer(bytes(text), dtype=np.uint8),
            text_spans=np.array(marks, dtype=np.int64).reshape(-1, 2 * len(TEXTS)),
            labels=_label_column(known),
            token_types=np.array(types, dtype=np.int8) if types else None,
            rejected=np.array(pairs, dtype=np.int64).reshape(-1, PAIR) if pairs else None,
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
    def longest(self) -> Ints:
        """Tokens of the longest sequence of each example, [E]."""
        if self.rejected is None:
            return self.lengths
        found: Ints = np.maximum(self.lengths, self.rejected[:, 1] - self.rejected[:, 0])
        return found

    @property
    def longest_prompts(self) -> Ints:
        """Prompt tokens of each example, [E]; of a pair, whose tokens at the boundary may differ, the longer prompt."""
        return self.prompt_lengths if self.rejected is None else np.maximum(self.prompt_lengths, self.rejected[:, 2])

    @property
    def sizes(self) -> Ints:
        """Tokens that each example takes in a padded batch by itself, [E]; a pair is two sequences."""
        return self.longest if self.rejected is None else 2 * self.longest

    @property
    def token_count(self) -> int:
        """Tokens of all sequences."""
        return int(self.sequences().lengths.sum())

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
        found = Example(
            input_ids=self.tokens[start:stop].tolist(),
            prompt_length=int(self.prompt_lengths[index]),
            label=None if self.labels is None else self.labels[index].item(),
            row=int(self.rows[index]),
            token_types=None if self.token_types is None else self.token_types[start:stop].tolist(),
            **texts,
        )
        return found if self.rejected is None else replace(found, rejected=self._rejected(found, self.rejected[index]))

    def _rejected(self, chosen: Example, pair: Ints) -> Example:
        start, stop, prompt, *marks = pair.tolist()
        return replace(
            chosen,
            input_ids=self.tokens[start:stop].tolist(),
            prompt_length=prompt,
            label=None if chosen.label is None else 0,
            completion=self._text(*marks) or "",
        )

    def _text(self, start: int, stop: int) -> str | None:
        return None if start < 0 else self.text[start:stop].tobytes().decode("utf-8", "surrogatepass")

    def written(self) -> Iterator[bytes]:
        """Prompt and completion of each example, as one key that tells different ones apart."""
        for start, middle, begin, end in self.text_spans[:, :4].tolist():
            yield b"\0".join((self.text[start:middle].tobytes(), self.text[begin:end].tobytes()))

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
            rejected=None if self.rejected is None else self.rejected[chosen],
        )

    def sequences(self) -> Examples:
        """Of pairs [E], all chosen sequences and then all rejected ones [2 E], without texts; others as they are."""
        if self.rejected is None:
            return self
        return Examples(
            tokens=self.tokens,
            spans=np.concatenate([self.spans, self.rejected[:, :2]]),
            prompt_lengths=np.concatenate([self.prompt_lengths, self.rejected[:, 2]]),
            rows=np.tile(self.rows, 2),
            text=self.text[:0],
            text_spans=np.full((2 * len(self), 2 * len(TEXTS)), -1, dtype=np.int64),
            labels=None if self.labels is None else np.concatenate([self.labels, np.zeros_like(self.labels)]),
        )

    def cut_at(self, length: int) -> Examples:
        """The examples with at most the first `length` tokens of each sequence, which they share."""
        pairs = None if self.rejected is None else self.rejected.copy()
        if pairs is not None:
            pairs[:, :2] = _shortened(pairs[:, :2], length)
        return replace(self, spans=_shortened(self.spans, length), rejected=pairs)

    def longest_first(self) -> Examples:
        """The examples by falling size, those of one size by their row."""
        return self.take(np.lexsort((self.rows, -self.sizes)))


def ranges(starts: Ints, stops: Ints) -> Ints:
    """The numbers of every half-open range [starts[i], stops[i]), one range after the other."""
    counts = stops - starts
    before = np.cumsum(counts) - counts
    numbers: Ints = np.repeat(starts - before, counts) + np.arange(counts.sum(), dtype=np.int64)
    return numbers


def _appended(tokens: array[int], ids: Sequence[int]) -> tuple[int, int]:
    """Put more tokens at the end; (the first one's place, the place after the last)."""
    start = len(tokens)
    tokens.extend(ids)
    return start, len(tokens)


def _written(text: bytearray, part: str | None) -> tuple[int, int]:
    """Put a text at the end; its bounds."""
    if part is None:
        return -1, -1
    start = len(text)
    text += part.encode("utf-8", "surrogatepass")
    return start, len(text)


def _shortened(spans: Ints, length: int) -> Ints:
    found: Ints = np.stack([spans[:, 0], np.minimum(spans[:, 1], spans[:, 0] + length)], axis=1)
    return found


def _label_column(labels: Sequence[int | float]) -> Ints | NDArray[np.float64] | None:
    if not labels:
        return None
    return np.array(labels, dtype=np.float64) if isinstance(labels[0], float) else np.array(labels, dtype=np.int64)
