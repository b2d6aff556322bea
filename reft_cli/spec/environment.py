"""`${env:NAME}` and `${env:NAME:-default}` in values.

A plain value that is one reference and nothing else is typed like YAML, so `seed: ${env:SEED:-42}` is a number; in
quotes, or with text around it, it is text. `$${env:` stands for the characters `${env:` themselves.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace

from reft_cli.errors import Problem
from reft_cli.spec.quoting import KeyPath, dotted, printable
from reft_cli.spec.scalars import read_scalar
from reft_cli.spec.yaml_tree import Node

REFERENCE = re.compile(
    r"\$(?P<literal>\$\{env:)"
    r"|\$\{env:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<default>:-[^}]*)?\}"
    r"|(?P<wrong>\$\{env:[^}]*\}?)"
)


def escape(text: str) -> str:
    """Text that reads back as itself, whatever references it seems to hold."""
    return text.replace("${env:", "$${env:")


def substitute(node: Node, *, problems: list[Problem], path: KeyPath = ()) -> Node:
    """The tree with every reference replaced; what cannot be replaced is reported and broken."""
    if isinstance(node.value, dict):
        return replace(
            node,
            value={key: substitute(item, problems=problems, path=(*path, key)) for key, item in node.value.items()},
        )
    if isinstance(node.value, list):
        return replace(
            node,
            value=[substitute(item, problems=problems, path=(*path, index)) for index, item in enumerate(node.value)],
        )
    return _in_scalar(node, problems, path) if isinstance(node.value, str) else node


def _in_scalar(node: Node, problems: list[Problem], path: KeyPath) -> Node:
    wrong: list[str] = []

    def fill(match: re.Match[str]) -> str:
        if match["literal"]:
            return match["literal"]
        if match["wrong"]:
            shown = printable(match["wrong"])
            wrong.append(f"`{shown}` is no reference; write ${{env:NAME}} or ${{env:NAME:-default}}")
        elif match["name"] in os.environ:
            return os.environ[match["name"]]
        elif match["default"] is None:
            name = match["name"]
            wrong.append(f"environment variable {name} is not set (write ${{env:{name}:-default}} to give a default)")
        return (match["default"] or "")[2:]

    value = REFERENCE.sub(fill, str(node.value))
    if not wrong and (fault := unusable(value)):
        wrong.append(fault)
    if wrong:
        problems += [node.start.problem(message, key=dotted(path)) for message in wrong]
        return replace(node, broken=True)
    whole = REFERENCE.fullmatch(node.text)
    if node.plain and whole and whole["name"]:
        return replace(node, value=read_scalar(value), text=value)
    return replace(node, value=value, text=value)


def unusable(text: str) -> str | None:
    """Why a string could not be used as a path or be printed, if so."""
    if "\0" in text:
        return "text cannot hold the character U+0000"
    if any("\ud800" <= ch <= "\udfff" for ch in text):
        return f"`{printable(text)}` holds half a character, or is not UTF-8"
    return None
