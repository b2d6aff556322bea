"""A tree against the schema: every problem at once, in plain words, each with its place.

pydantic stops a section's cross-field checks at the first bad field. So what is wrong is taken out, and the rest is
looked at again, until nothing new is found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from pydantic import ValidationError

from reft_cli.errors import Problem
from reft_cli.spec.faults import Fault, faults_of
from reft_cli.spec.fields import branches_at
from reft_cli.spec.quoting import KeyPath
from reft_cli.spec.schema import Spec
from reft_cli.spec.wording import problem_of
from reft_cli.spec.yaml_tree import Node

STAND_IN = "?"  # the value of a required key whose own value is wrong, so that the rest can be checked


def validate(root: Node, *, problems: list[Problem]) -> Spec | None:
    """The spec of a tree, or None with every problem added to `problems`."""
    rest = _Rest(root)
    while True:
        try:
            spec = Spec.model_validate(rest.values)
            return None if problems else spec
        except ValidationError as error:
            faults = [fault for fault in faults_of(error, root) if not rest.is_settled(fault.path)]
            if not faults:
                assert problems, str(error)
                return None
        problems += rest.settle(faults)


class _Rest:
    """What of a tree is still to be looked at, as plain values; settled is what was said or has no need to be."""

    def __init__(self, root: Node) -> None:
        self.root = root
        self.values: dict[str, Any] = root.plain_value()
        self.settled = set(_broken(root))
        for path in self.settled:
            self._take_out(path, needed=False)

    def is_settled(self, path: KeyPath) -> bool:
        """Whether the value at a path is settled, or one above it."""
        return any(path[:end] in self.settled for end in range(1, len(path) + 1))

    def settle(self, faults: Sequence[Fault]) -> list[Problem]:
        """Take out what is wrong; the problems of it, less those that others explain."""
        for fault in faults:
            self.settled.update(filter(None, map(self._absent, fault.meant)))  # a misspelt key is not missed as well
        told = []
        for fault in faults:
            if not any(map(self.is_settled, (fault.path, *fault.keys))):
                told.append(problem_of(fault, self.root))
            self.settled.add(fault.path)
            self._take_out(fault.path, needed=not fault.is_unknown_key and not self.root.find(fault.path))
        return told

    def _absent(self, path: KeyPath) -> KeyPath | None:
        """The part of a path down to where nothing is any more; None if all of it is there."""
        return next((path[:end] for end in range(1, len(path) + 1) if not self.root.find(path[:end])), None)

    def _take_out(self, path: KeyPath, *, needed: bool) -> None:
        """Remove a key, the whole list of a bad item; what is needed or required gets a stand-in."""
        keys = tuple(str(part) for part in takewhile(lambda part: isinstance(part, str), path))
        *above, last = keys
        values = self.values
        for key in above:
            inner = values.get(key)
            if not isinstance(inner, dict):
                inner = values[key] = {"name": inner} if isinstance(inner, str) else {}  # `model: NAME` is a section
            values = inner
        values.pop(last, None)
        if needed or _is_required(keys):
            values[last] = STAND_IN


def _broken(node: Node, path: KeyPath = ()) -> Iterator[KeyPath]:
    """The paths of values that were reported when they were read."""
    if node.broken:
        yield path
    elif isinstance(node.value, dict):
        for key, item in node.value.items():
            yield from _broken(item, (*path, key))
    elif isinstance(node.value, list):
        for index, item in enumerate(node.value):
            yield from _broken(item, (*path, index))


def _is_required(path: KeyPath) -> bool:
    *above, last = path
    return any(
        branch.section.model_fields[str(last)].is_required()
        for branch in branches_at(tuple(above))
        if branch.section and last in branch.section.model_fields
    )
