"""PyYAML's syntax errors in plain words: what is wrong, and what to write instead."""

from __future__ import annotations

import re
from typing import Protocol

import yaml

from reft_cli.spec.quoting import printable

INDENTATION = "wrong indentation, or a `:` is missing"
# What PyYAML says (a pattern), what we say, whether the place is where the construct began
WORDS: tuple[tuple[str, str, bool], ...] = (
    (r"found character '\\t' that cannot start any token", "a tab is not allowed here; use spaces", False),
    (r"found character '(.+)' that cannot start", "a value cannot start with `{0}`; put it in quotes", False),
    (r"could not find expected ':'", "no `:` after this key; write `key: value`", True),
    (
        r"mapping values are not allowed",
        "`key: value` is not allowed here; check the indentation, and put a value that holds `: ` in quotes",
        False,
    ),
    (
        r"sequence entries are not allowed",
        "a list item is not allowed here; start the list on a line of its own",
        False,
    ),
    (r"mapping keys are not allowed", "`? ` is not allowed here", False),
    (r"found unexpected end of stream|found unexpected document", "the quote that opens here is never closed", True),
    (
        r"unknown escape character '(.+)'",
        r"`\{0}` means nothing in double quotes; use single quotes, or write `\\`",
        False,
    ),
    (r"expected escape sequence of (\d+) hex", r"after `\x`, `\u` or `\U` come {0} hexadecimal digits", False),
    (
        r"expected alphabetic or numeric character",
        "`*` and `&` name aliases and anchors; put the value in quotes",
        True,
    ),
    (
        r"expected chomping|expected a comment or a line break",
        "after `|` or `>` the text starts on the next line",
        False,
    ),
    (
        r"undefined tag handle|expected URI",
        "tags (`!…`) have no meaning here; remove it, or put the value in quotes",
        False,
    ),
    (r"expected ',' or '.', but got '<stream end>'", "the bracket that opens here is never closed", True),
    (r"expected ',' or '(.)'", "`,` or `{0}` is missing before this", False),
    (r"invalid indentation or unclosed", "wrong indentation, or a `[` or `{{` that is never closed", False),
    (r"expected <block end>", INDENTATION, False),
    (r"expected the node content", "a value cannot start like this; put it in quotes", False),
    (r"expected '<document start>'", "this does not belong to what stands above it; " + INDENTATION, False),
    (r"incompatible YAML document", "a `%YAML` line may say 1.1 or 1.2; remove it", False),
)


class Mark(Protocol):
    """A place in a text, counted from 0."""

    line: int
    column: int


def explain(error: yaml.MarkedYAMLError, text: str) -> tuple[str, Mark | None]:
    """(what is wrong in one line, where)."""
    for pattern, words, at_start in WORDS:
        match = re.search(pattern, error.problem or "", re.DOTALL)
        if match:
            message = words.format(*(printable(group) for group in match.groups()))
            mark = error.context_mark if at_start and error.context_mark else error.problem_mark
            return message + _bracket(error, mark, text), mark
    return printable(error.problem or "not YAML", limit=200), error.problem_mark or error.context_mark


def _bracket(error: yaml.MarkedYAMLError, mark: Mark | None, text: str) -> str:
    """More about an open bracket: where it is, and the usual culprit, an unquoted `${env:…}` inside."""
    if not (error.context or "").startswith("while parsing a flow") or error.context_mark is None:
        return ""
    start = error.context_mark
    opened = f" (the bracket opens on line {start.line + 1})" if mark is None or start.line != mark.line else ""
    line = text.split("\n")[start.line] if start.line < text.count("\n") + 1 else ""
    return opened + ("; inside brackets, ${env:…} needs quotes or a line of its own" if "${env:" in line else "")
