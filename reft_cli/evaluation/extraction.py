"""How an answer is found in generated text: published rules, those rules with their mistakes repaired, and the user's.

Published rules are those of LLM-Adapters, which the ReFT paper follows. Nothing found is the empty text, and wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class Rule(Protocol):
    """Text -> the answer in it."""

    def find(self, text: str, *, reference: str) -> str:
        """The answer; empty if there is none. `reference` says of what kind it is and nothing else."""
        ...


@dataclass(frozen=True)
class Extraction:
    """What stands `after` a text, less what is to `remove`, and there the first or last match of a pattern."""

    after: str | None = None
    remove: tuple[str, ...] = ()
    pattern: str | None = None
    take: str = "first"
    ignore_case: bool = False

    def find(self, text: str, *, reference: str = "") -> str:
        """The answer; empty if there is none."""
        if self.after is not None:
            _, _, text = text.partition(self.after)
        for unwanted in self.remove:
            text = text.replace(unwanted, "")
        if self.pattern is None:
            return text.strip()
        flags = re.IGNORECASE if self.ignore_case else re.NOFLAG
        matches = list(re.finditer(self.pattern, text, flags))
        if not matches:
            return ""
        match = matches[0 if self.take == "first" else -1]
        return next((group for group in match.groups() if group is not None), match[0])


@dataclass(frozen=True)
class FirstFound:
    """Rules that are tried in turn."""

    rules: tuple[Extraction, ...]

    def find(self, text: str, *, reference: str = "") -> str:
        """The first answer that a rule finds; empty if none does."""
        return next(filter(None, (rule.find(text) for rule in self.rules)), "")


@dataclass(frozen=True)
class ByReference:
    """A number where the reference is one, else a letter."""

    number: Rule
    letter: Rule

    def find(self, text: str, *, reference: str) -> str:
        """The answer; empty if there is none."""
        return (self.number if is_number(reference) else self.letter).find(text, reference=reference)


def is_number(text: str) -> bool:
    """Whether all of a text is one number, as AQuA's letters are not."""
    try:
        float(text)
    except ValueError:
        return False
    return True


NUMBER = Extraction(remove=(",",), pattern=r"-?\d+\.?\d*", take="last")
LETTER = Extraction(pattern="A|B|C|D|E")
# A comma belongs to a number between groups of three digits only; a minus sign after a digit is a difference.
FIGURE = r"(?:(?<![\d.])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?:(?<![\d.])-)?(?<!\d)\.\d+"
ANNOUNCED = r"(?:answer\s*(?:is|:|=)|####)[^\d\n]{0,20}?"
NUMBER_STRICT = FirstFound(
    (
        Extraction(remove=("$",), pattern=rf"{ANNOUNCED}({FIGURE})", take="last", ignore_case=True),
        Extraction(remove=("$",), pattern=FIGURE, take="last"),
    )
)
LETTER_STRICT = FirstFound(
    (
        Extraction(pattern=r"(?i:answer\s*(?:is|:|=))\W*(?i:option\s+)?([A-E])\b", take="last"),
        Extraction(pattern=r"\(([A-E])\)", take="last"),
        Extraction(pattern=r"\b([B-E])\b|\A\W*(A)\W*\Z", take="last"),
    )
)
NAMED: dict[str, Rule] = {
    "number": NUMBER,
    "number_strict": NUMBER_STRICT,
    "letter": LETTER,
    "letter_strict": LETTER_STRICT,
    "arithmetic": ByReference(NUMBER, LETTER),
    "arithmetic_strict": ByReference(NUMBER_STRICT, LETTER_STRICT),
}


def rule_of(given: str | Mapping[str, Any] | None) -> Rule | None:
    """The rule that `task.extraction` means: a name, its keys, or None for the whole text."""
    if given is None:
        return None
    if isinstance(given, str):
        return NAMED[given]
    return Extraction(**{**given, "remove": tuple(given.get("remove", ()))})
