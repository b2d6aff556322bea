"""Which tokens are edited: the grammar `f7+l7`, and the token numbers it means in one sequence.

Positions are counted on the prompt from its first token (0), special tokens included. This module knows no tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Phase = Literal["prompt", "generation", "both"]
GRAMMAR = re.compile(r"f(?P<f>[1-9]\d*)|l(?P<l>[1-9]\d*)|f(?P<ff>[1-9]\d*)\+l(?P<ll>[1-9]\d*)|all|prompt|generated")
SPANS: dict[str, Phase] = {"prompt": "prompt", "generated": "generation", "all": "both"}


@dataclass(frozen=True)
class PositionGroup:
    """A set of positions that share one set of weights in each layer.

    `first` and `last` are counts of the whole expression, so that an untied prefix knows where the suffix begins.
    """

    name: str
    first: int = 0
    last: int = 0
    part: Literal["prefix", "suffix", "prefix+suffix", "prompt", "generated", "all"] = "prefix+suffix"

    @property
    def phase(self) -> Phase:
        """When the group is live: while the prompt is read, while tokens are generated, or both."""
        return SPANS.get(self.part, "prompt")

    def indices(self, prompt_length: int, length: int) -> list[int]:
        """The edited tokens of a sequence of `length` tokens whose first `prompt_length` are the prompt."""
        return [token for span in self.ranges(prompt_length, length) for token in span]

    def ranges(self, prompt_length: int, length: int) -> tuple[range, ...]:
        """The same tokens as one range or two."""
        if self.part == "all":
            return (range(length),)
        if self.part == "generated":
            return (range(prompt_length, length),)
        if self.part == "prompt":
            return (range(prompt_length),)
        prefix, suffix = split_counts(prompt_length, self.first, self.last)
        head, tail = range(prefix), range(prompt_length - suffix, prompt_length)
        return {"prefix": (head,), "suffix": (tail,), "prefix+suffix": (head, tail)}[self.part]


@dataclass(frozen=True)
class Positions:
    """A parsed expression: `f7+l7`, `f3`, `l1`, `prompt`, `generated` or `all`."""

    first: int = 0
    last: int = 0
    span: Literal["prompt", "generated", "all"] | None = None

    @classmethod
    def parse(cls, text: str) -> Positions:
        """Read an expression; ValueError says what can be written."""
        match = GRAMMAR.fullmatch(text)
        if match is None:
            raise ValueError(
                f"`{text}` is not a position; write f7 (first 7), l7 (last 7), f7+l7, prompt, generated or all"
            )
        if text in SPANS:
            return cls(span=text)  # type: ignore[arg-type]  # the three keys of SPANS
        return cls(first=int(match["f"] or match["ff"] or 0), last=int(match["l"] or match["ll"] or 0))

    def __str__(self) -> str:
        return self.span or "+".join(
            f"{letter}{count}" for letter, count in (("f", self.first), ("l", self.last)) if count
        )

    def groups(self, *, tied: bool) -> tuple[PositionGroup, ...]:
        """One group, or two (prefix and suffix, each with weights of its own) when `tied` is false."""
        if self.span:
            return (PositionGroup(name=self.span, part=self.span),)
        both = bool(self.first and self.last)
        if both and not tied:
            return (
                PositionGroup(f"f{self.first}", self.first, self.last, "prefix"),
                PositionGroup(f"l{self.last}", self.first, self.last, "suffix"),
            )
        return (PositionGroup(str(self), self.first, self.last),)

    @property
    def shortest_whole_prompt(self) -> int:
        """The shortest prompt in which every position exists once."""
        return self.first + self.last


def split_counts(prompt_length: int, first: int, last: int) -> tuple[int, int]:
    """(prefix, suffix) token counts, never overlapping.

    A prompt of n < first + last tokens is split floor(n/2) : ceil(n/2) (paper, section 4.1); what one side does not
    ask for goes to the other. pyreft floors both sides and leaves the middle token of an odd prompt unedited.
    """
    suffix = min(last, prompt_length - prompt_length // 2)
    prefix = min(first, prompt_length - suffix)
    return prefix, min(last, prompt_length - prefix)
