"""The schema, looked at from outside: which keys there are, and what a field takes, in words."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from reft_cli.spec.base import Section, Words
from reft_cli.spec.quoting import KeyPath, listed
from reft_cli.spec.schema import Spec

LISTED_KEYS = 8


@dataclass(frozen=True)
class Branch:
    """One of the types that a field takes, with its bounds; `nullable` if the field takes null too."""

    type: Any
    metadata: tuple[Any, ...] = ()
    nullable: bool = False

    @property
    def section(self) -> type[Section] | None:
        """The section, if it is one."""
        return self.type if isinstance(self.type, type) and issubclass(self.type, Section) else None

    @property
    def is_bare_section(self) -> bool:
        """Whether it is a section that no scalar can stand for."""
        return self.section is not None and not any(isinstance(item, Words) for item in self.metadata)

    @property
    def container(self) -> Any:  # noqa: ANN401  list, dict or None
        """list, dict or None."""
        return get_origin(self.type) if get_origin(self.type) in (list, dict) else None

    def inside(self, part: str | int) -> list[Branch]:
        """The branches of a key or item in it; none if the key is unknown."""
        if self.section and part in self.section.model_fields:
            return branches_of(self.section.model_fields[str(part)])
        if self.container:
            return branches(get_args(self.type)[-1])
        return []


def branches(annotation: Any, metadata: tuple[Any, ...] = ()) -> list[Branch]:  # noqa: ANN401  a type
    """The types of a union, `None` left out."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return branches(inner, (*metadata, *_flat(more)))
    if get_origin(annotation) in (Union, types.UnionType):
        parts = get_args(annotation)
        found = [branch for part in parts for branch in branches(part, metadata)]
        return [replace(branch, nullable=True) for branch in found] if type(None) in parts else found
    return [] if annotation is type(None) else [Branch(annotation, metadata)]


def branches_of(field: FieldInfo) -> list[Branch]:
    """The types that a field of a section takes."""
    return branches(field.annotation, tuple(field.metadata))


def _flat(metadata: list[Any]) -> Iterator[Any]:
    for item in metadata:
        yield from item.metadata if isinstance(item, FieldInfo) else (item,)


@cache
def known_keys(section: type[Section] = Spec, above: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Every key of the spec, dotted, sections before their keys."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(".".join((*above, name)))
        for branch in branches_of(field):
            if branch.section:
                keys += known_keys(branch.section, (*above, name))
    return tuple(keys)


def branches_at(path: KeyPath) -> list[Branch]:
    """The types that the key at a path takes; none if there is no such key."""
    found = [Branch(Spec)]
    for part in path:
        found = [inner for branch in found for inner in branch.inside(part)]
    return found


@cache
def keys_in(path: KeyPath) -> tuple[str, ...]:
    """The keys that can stand in a section; none if it is no section."""
    return tuple(name for branch in branches_at(path) if branch.section for name in branch.section.model_fields)


def options(found: list[Branch]) -> list[str]:
    """The words that a field takes, such as auto and epoch."""
    return [str(word) for branch in found if get_origin(branch.type) is Literal for word in get_args(branch.type)]


def in_words(found: list[Branch]) -> str:
    """What a field takes: `auto or a whole number of at least 1`."""
    if len(found) == 1 and len(options(found)) > 1:  # never with Words
        return f"one of {', '.join(options(found))}"
    return listed(list(dict.fromkeys(part for branch in found for part in _branch_in_words(branch))))


def _branch_in_words(branch: Branch) -> list[str]:
    given = [item.text for item in branch.metadata if isinstance(item, Words)]
    return given or options([branch]) or [_type_in_words(branch)]


def _type_in_words(branch: Branch) -> str:
    if branch.section:
        keys = list(branch.section.model_fields)
        shown = ", ".join(keys[:LISTED_KEYS]) + (", …" if len(keys) > LISTED_KEYS else "")
        return f"a mapping (keys: {shown})"
    least = next((item.min_length for item in branch.metadata if isinstance(item, MinLen)), 0)
    if branch.container is list:
        bound = f", at least {least}" if least else ""
        return f"a list ({_item_in_words(branch)}{bound})"
    if branch.container is dict:
        return "a mapping of names to text"
    if branch.type is str:
        return "text"
    name = {int: "a whole number", float: "a number", bool: "true or false"}[branch.type]
    return name + _bounds(branch.metadata)


def _item_in_words(branch: Branch) -> str:
    inner = branches(get_args(branch.type)[-1])
    if inner[0].section:
        return "mappings"
    return listed(options(inner)) if options(inner) else {int: "whole numbers", str: "text"}[inner[0].type]


def _bounds(metadata: tuple[Any, ...]) -> str:
    shown = {Ge: "of at least {0.ge}", Gt: "above {0.gt}", Lt: "below {0.lt}", Le: "at most {0.le}"}
    parts = [text.format(item) for kind, text in shown.items() for item in metadata if isinstance(item, kind)]
    return f" {' and '.join(parts)}" if parts else ""
