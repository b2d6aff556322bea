"""Where the errors are that pydantic finds in a tree: paths of keys, without its names for the branches of a union."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from reft_cli.spec.base import Conflict
from reft_cli.spec.fields import Branch
from reft_cli.spec.names import nearest_keys
from reft_cli.spec.quoting import KeyPath
from reft_cli.spec.schema import Spec
from reft_cli.spec.yaml_tree import Node

CHECKED = re.compile(r"function-\w+\[\w+\(\), (\w+)\]")  # how pydantic names a section with checks of its own


@dataclass(frozen=True)
class Fault:
    """What pydantic says about one value: where, which types would do, and its complaint."""

    path: KeyPath
    branches: tuple[Branch, ...]
    error: ErrorDetails
    keys: tuple[KeyPath, ...] = ()
    """All that a conflict is between."""

    @property
    def kind(self) -> str:
        """pydantic's name for the complaint."""
        return self.error["type"]

    @property
    def cause(self) -> object:
        """The exception that a check of ours raised, if it was one."""
        return _cause(self.error)

    @property
    def is_unknown_key(self) -> bool:
        """Whether it is a key that the schema does not have."""
        return self.kind == "extra_forbidden"

    @property
    def meant(self) -> list[KeyPath]:
        """The keys that an unknown one was probably meant to be."""
        return [tuple(key.split(".")) for key in nearest_keys(self.path)] if self.is_unknown_key else []


def faults_of(error: ValidationError, root: Node) -> list[Fault]:
    """All that is wrong with a tree, in pydantic's order; a union is complained of once."""
    located = (_locate(each, root) for each in error.errors(include_url=False))
    return [fault for fault in located if fault is not None]


def _locate(error: ErrorDetails, root: Node) -> Fault | None:
    """One error; None for one of a union's branch that was not meant."""
    path, branches = KeyPath(), [Branch(Spec)]
    node: Node | None = root
    for part in error["loc"]:
        if len(branches) > 1:  # then the part is no key but the branch that pydantic tried
            meant = _meant(branches, node)
            if meant is None:
                break
            if CHECKED.sub(r"\1", str(part)) != _label(meant):
                return None
            branches = [meant]
        else:
            path = (*path, part)
            branches = branches[0].inside(part) if branches else []
            node = node.child(part) if node else None
    cause = _cause(error)
    if not isinstance(cause, Conflict):
        return Fault(path, tuple(branches), error)
    keys = tuple((*path, *_path_of(key)) for key in cause.keys)
    return Fault(_to_change(keys, root) if keys else path, tuple(branches), error, keys)


def _cause(error: ErrorDetails) -> object:
    return error.get("ctx", {}).get("error")


def _path_of(key: str) -> KeyPath:
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def _to_change(keys: tuple[KeyPath, ...], root: Node) -> KeyPath:
    """The first key of a conflict that a user wrote, else the first that a suite did."""
    there = [(key, node) for key in keys if (node := root.find(key))]
    written = [key for key, node in there if not node.at.suite]
    return [*written, *(key for key, _ in there), *keys][0]


def _meant(branches: list[Branch], node: Node | None) -> Branch | None:
    """The branch of a union that a list or mapping was meant for; None for a scalar."""
    value = node.value if node else None
    if isinstance(value, list):
        return next((branch for branch in branches if branch.container is list), None)
    if isinstance(value, dict):
        return next((branch for branch in branches if branch.section or branch.container is dict), None)
    return None


def _label(branch: Branch) -> str:
    """pydantic's name for the branch in the path of an error."""
    if branch.section:
        return branch.section.__name__
    return f"{branch.container.__name__}[{', '.join(item.__name__ for item in get_args(branch.type))}]"
