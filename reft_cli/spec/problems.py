"""A tree against the schema: every problem at once, in plain words, each with its place.

pydantic stops a section's cross-field checks at the first bad field, and reports each branch of a union. So what is
wrong is taken out and the rest is looked at again until nothing is left to say, and a union gives one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from reft_cli.errors import Problem
from reft_cli.spec.base import Conflict
from reft_cli.spec.fields import Branch, branches_at, in_words, keys_in, options
from reft_cli.spec.names import nearest_keys, remark_on
from reft_cli.spec.quoting import KeyPath, dotted, listed, printable, yaml_inline
from reft_cli.spec.scalars import read_scalar
from reft_cli.spec.schema import Spec
from reft_cli.spec.task import KINDS_ELSEWHERE
from reft_cli.spec.yaml_tree import Node

OTHER_WORDS = {
    "yes": "true",
    "on": "true",
    "y": "true",
    "no": "false",
    "off": "false",
    "n": "false",
    "none": "null",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "nodireft": "direft",
    "4bit": "nf4",
    "int4": "nf4",
    "8bit": "int8",
    "fp8": "float8",
    "cosine_with_restarts": "cosine",
    "constant_with_warmup": "constant",
    **KINDS_ELSEWHERE,
    "em": "exact_match",
    "mcc": "matthews",
    "sharegpt": "messages",
    "openai": "messages",
    "chatml": "messages",
}
CHECKED = re.compile(r"function-\w+\[\w+\(\), (\w+)\]")  # how pydantic names a section with checks of its own
STAND_IN = "?"  # the value of a required key whose own value is wrong, so that the rest can be checked


@dataclass(frozen=True)
class _Found:
    """What pydantic says about one value: where, which types would do, and its complaint."""

    path: KeyPath
    wanted: tuple[Branch, ...]
    error: ErrorDetails
    keys: tuple[KeyPath, ...] = ()  # of a conflict

    @property
    def unknown(self) -> bool:
        """Whether it is a key that the schema does not have."""
        return self.error["type"] == "extra_forbidden"

    @property
    def meant(self) -> list[KeyPath]:
        """The keys that an unknown one was probably meant to be."""
        return [tuple(key.split(".")) for key in nearest_keys(self.path)] if self.unknown else []


def validate(root: Node, *, problems: list[Problem]) -> Spec | None:
    """The spec of a tree, or None with every problem added to `problems`."""
    tree = root.plain_value()
    faulty = set(_broken(root))
    for path in faulty:
        _take_out(tree, path, needed=False)
    while True:
        try:
            spec = Spec.model_validate(tree)
            return None if problems else spec
        except ValidationError as error:
            error_text = str(error)
            found = [item for detail in error.errors(include_url=False) if (item := _locate(detail, root))]
        new = [item for item in found if not _known(item.path, faulty)]
        if not new:
            assert problems, error_text
            return None
        faulty |= {
            absent for item in new for key in item.meant if (absent := _absent(root, key))
        }  # else missed as well
        for item in new:
            if not (_known(item.path, faulty) or any(_known(key, faulty) for key in item.keys)):
                problems.append(_problem(item, root))
            faulty.add(item.path)
            _take_out(tree, item.path, needed=not item.unknown and not root.find(item.path))


def _broken(node: Node, path: KeyPath = ()) -> Iterator[KeyPath]:
    if node.broken:
        yield path
    elif isinstance(node.value, dict):
        for key, item in node.value.items():
            yield from _broken(item, (*path, key))
    elif isinstance(node.value, list):
        for index, item in enumerate(node.value):
            yield from _broken(item, (*path, index))


def _known(path: KeyPath, faulty: set[KeyPath]) -> bool:
    return any(path[:end] in faulty for end in range(1, len(path) + 1))


def _take_out(tree: dict[str, Any], path: KeyPath, *, needed: bool) -> None:
    """Remove a key, the whole list of a bad item; what is needed or required gets a stand-in."""
    keys = [str(part) for part in path[: next((i for i, part in enumerate(path) if isinstance(part, int)), len(path))]]
    for part in keys[:-1]:
        inner = tree.get(part)
        if not isinstance(inner, dict):
            inner = tree[part] = {"name": inner} if isinstance(inner, str) else {}
        tree = inner
    last = keys[-1]
    tree.pop(last, None)
    if needed or _required(tuple(keys)):
        tree[last] = STAND_IN


def _required(path: KeyPath) -> bool:
    *above, last = path
    return any(
        branch.section.model_fields[str(last)].is_required()
        for branch in branches_at(tuple(above))
        if branch.section and last in branch.section.model_fields
    )


def _locate(error: ErrorDetails, root: Node) -> _Found | None:
    """Where an error is, less pydantic's names for the branches of a union; None for a branch that was not meant."""
    wanted, path = [Branch(Spec)], KeyPath()
    node: Node | None = root
    for part in error["loc"]:
        if len(wanted) > 1:
            meant = _meant(wanted, node)
            if meant is None:
                break
            if CHECKED.sub(r"\1", str(part)) != _label(meant):
                return None
            wanted = [meant]
            continue
        path = (*path, part)
        wanted = wanted[0].inside(part) if wanted else []
        node = node.child(part) if node else None
    cause = error.get("ctx", {}).get("error")
    keys = tuple((*path, *_parts(key)) for key in cause.keys) if isinstance(cause, Conflict) else ()
    if keys:
        there = [(key, node) for key in keys if (node := root.find(key))]
        path = next((key for key, node in there if not node.at.suite), there[0][0] if there else keys[0])
    return _Found(path, tuple(wanted), error, keys)


def _parts(key: str) -> KeyPath:
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def _meant(wanted: list[Branch], node: Node | None) -> Branch | None:
    """The branch of a union that a list or mapping was meant for; None for a scalar."""
    if node is None or not isinstance(node.value, dict | list):
        return None
    return next(
        (
            branch
            for branch in wanted
            if (
                branch.container is list if isinstance(node.value, list) else branch.section or branch.container is dict
            )
        ),
        None,
    )


def _label(branch: Branch) -> str:
    """pydantic's name for the branch in the path of an error."""
    if branch.section:
        return branch.section.__name__
    return f"{branch.container.__name__}[{', '.join(item.__name__ for item in get_args(branch.type))}]"


def _absent(root: Node, path: KeyPath) -> KeyPath | None:
    """The part of a path down to where nothing is any more; None if all of it is there."""
    return next((path[:end] for end in range(1, len(path) + 1) if not root.find(path[:end])), None)


def _nearest(root: Node, path: KeyPath) -> Node:
    """The node at a path, or the one above it that is there and that a user wrote."""
    for part in path:
        inner = root.child(part)
        if inner is None or inner.at.suite:
            break
        root = inner
    return root


def _problem(item: _Found, root: Node) -> Problem:
    node, hint = _nearest(root, item.path), None
    cause = item.error.get("ctx", {}).get("error")
    if item.unknown:
        message, hint = _unknown_key(item.path)
    elif item.error["type"] == "missing":
        message = _missing(item.path)
    elif item.error["type"] == "too_short":
        message = f"at least {item.error['ctx']['min_length']} are needed"
    elif isinstance(cause, ValueError):
        message = printable(str(cause), limit=400)
    else:
        message, hint = _wrong_value(node, list(item.wanted))
    if not hint:
        hint = _of_a_suite(item, root)
    return node.at.problem(message, key=dotted(item.path), hint=hint)


def _of_a_suite(item: _Found, root: Node) -> str | None:
    """How to get rid of a suite's value that excludes one of the user's."""
    there = [(key, node) for key in item.keys if (node := root.find(key)) and node.at.suite]
    return f"{dotted(there[0][0])} is of {there[0][1].at.suite}; write another, or null" if there else None


def _unknown_key(path: KeyPath) -> tuple[str, str | None]:
    near, remark = nearest_keys(path), remark_on(path)
    if near:
        meant = listed([f"`{key}`" for key in near]) + (f" ({remark})" if remark else "")
        return f"unknown key; did you mean {meant}?", near[0]
    if remark:
        return f"unknown key; {remark}", None
    return f"unknown key; known here: {', '.join(keys_in(path[:-1]))}", None


def _missing(path: KeyPath) -> str:
    *above, last = path
    sections = [branch.section for branch in branches_at(tuple(above)) if branch.section]
    text = " ".join((sections[0].model_fields[str(last)].description or "").split())
    return f"missing; {text[:1].lower()}{text[1:].rstrip('.')}"


def _wrong_value(node: Node, wanted: list[Branch]) -> tuple[str, str | None]:
    words = in_words(wanted)
    if node.plain and not node.text:
        if len(wanted) == 1 and wanted[0].is_bare_section:
            return "the section is empty; remove the line, or give it keys", None
        return f"no value is given; write {words}", None
    if node.value == "" and any(branch.type is str for branch in wanted):
        return "the text is empty", None
    advice, hint = _advice(node, wanted)
    return f"{_shown(node)} is not {words}{advice}", hint


def _shown(node: Node) -> str:
    if isinstance(node.value, dict | list):
        return "a mapping" if isinstance(node.value, dict) else "a list"
    looks_typed = not isinstance(read_scalar(node.text), str)
    return f'`"{printable(node.text)}"`' if looks_typed and not node.plain else f"`{printable(node.text)}`"


def _advice(node: Node, wanted: list[Branch]) -> tuple[str, str | None]:
    """What to write instead, if that can be guessed, and the bare value of it."""
    types, words = [branch.type for branch in wanted], options(wanted)
    only_text = str in types and all(branch.type is str or branch.section for branch in wanted)
    if isinstance(node.value, dict | list):  # `prompt: {question}` is a mapping to YAML
        return ("; put it in quotes" if only_text and isinstance(node.value, dict) else ""), None
    bare = read_scalar(node.text)
    if not node.plain and (
        (type(bare) in (int, float) and {int, float} & {*types})
        or (type(bare) is bool and bool in types)
        or (not isinstance(bare, str) and node.text in words)
    ):
        return "; remove the quotes", node.text
    if only_text and bare is not None and not isinstance(node.value, str):
        return "; put it in quotes", f'"{printable(node.text)}"'
    if [branch.container for branch in wanted] == [list] and bare is not None:
        return f"; write `{(listing := yaml_inline([bare]))}`", listing
    others = (["true", "false"] if bool in types else []) + (["null"] if wanted[0].nullable else [])
    guess = _guess(node.text, words, others=others)
    return (f"; did you mean `{guess}`?", guess) if guess else ("", None)


def _guess(text: str, words: list[str], *, others: list[str]) -> str | None:
    """The nearest of the words, or of what other tools call them; `others` only by another name."""
    plain = text.lower()
    if OTHER_WORDS.get(plain) in [*words, *others]:
        return OTHER_WORDS[plain]
    by_letters = {word.lower(): word for word in words}
    near = get_close_matches(plain, by_letters, 1, 0.5)
    return by_letters[near[0]] if near else None
