"""Layers of a spec: the files that `extends` names, below the file itself.

Mappings merge, lists and scalars replace. Each value keeps the place it was written at.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from reft_cli.errors import Problem, SpecError
from reft_cli.spec.data import SPLITS
from reft_cli.spec.environment import substitute
from reft_cli.spec.files import read_text
from reft_cli.spec.quoting import KeyPath, yaml_text
from reft_cli.spec.task import KINDS
from reft_cli.spec.yaml_tree import Node, Origin, read_tree

LONGEST_CHAIN = 20  # files below each other, and names in one `extends`
SOURCES = tuple(("data", split) for split in SPLITS)


def merge(base: Node, top: Node, *, path: KeyPath = ()) -> Node:
    """`top` over `base`: mappings merge, anything else replaces."""
    base = written_out(base, path=path) if isinstance(top.value, dict) else base
    if not (isinstance(base.value, dict) and isinstance(top.value, dict)):
        return top
    merged = dict(base.value)
    for key, node in top.value.items():
        merged[key] = merge(merged[key], node, path=(*path, key)) if key in merged else node
    return replace(top, value=merged, broken=base.broken or top.broken)


def written_out(node: Node, *, path: KeyPath) -> Node:
    """`model: gpt2` as `model: {name: gpt2}`, wherever a string stands for a mapping."""
    key = _main_key(path, node.value) if isinstance(node.value, str) else None
    return Node({key: node}, node.at, node.start) if key else node


def _main_key(path: KeyPath, text: str) -> str | None:
    """The key that a string is the value of, where it stands for a mapping."""
    if path == ("model",):
        return "name"
    if path == ("task",):
        return "kind" if text in KINDS else "suite"
    return "path" if path[:2] in SOURCES and len(path) <= 3 else None


@dataclass
class Layers:
    """Reads a file and all files below it, each once."""

    problems: list[Problem] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)  # by file, in the order they were read
    whole: bool = True  # false when a file below could not be read, so that its keys are not known
    _merged: dict[str, Node] = field(default_factory=dict)

    def read(self, path: Path, *, chain: tuple[Path, ...] = ()) -> Node:
        """The merged tree of a file and those it extends, without the key `extends`. SpecError: it cannot be read."""
        real = os.path.realpath(path)
        if real not in self._merged:
            text = self.texts.setdefault(str(path), read_text(path))
            root = read_tree(text, source=Origin(file=str(path)), problems=self.problems)
            _check_root(root)
            self._merged[real] = self._over_bases(root, (*chain, path))
        return self._merged[real]

    def _over_bases(self, root: Node, chain: tuple[Path, ...]) -> Node:
        assert isinstance(root.value, dict)
        own = {key: node for key, node in root.value.items() if key != "extends"}
        merged = Node({}, root.at, root.start)
        for item in self._names(root.value.get("extends")):
            base = self._base(item, chain)
            if base is not None:
                merged = merge(merged, base)
        return merge(merged, replace(root, value=own))

    def _names(self, extends: Node | None) -> list[Node]:
        if extends is None:
            return []
        extends = substitute(extends, problems=self.problems, path=("extends",))
        items = extends.value if isinstance(extends.value, list) else [extends]
        good = [item for item in items if isinstance(item.value, str) and not item.broken]
        if isinstance(extends.value, list) and len(good) == len(items) <= LONGEST_CHAIN:
            return good
        self.whole = False
        if not any(node.broken for node in (extends, *items)):
            example = yaml_text(extends.text) if isinstance(extends.value, str) else "base.yaml"
            message = f"a list of at most {LONGEST_CHAIN} files is needed; write `extends: [{example}]`"
            self.problems.append(extends.at.problem(message, key="extends"))
        return []

    def _base(self, item: Node, chain: tuple[Path, ...]) -> Node | None:
        path = chain[-1].parent / str(item.value)
        places = [os.path.realpath(link) for link in chain]
        if os.path.realpath(path) in places:
            loop = [*chain[places.index(os.path.realpath(path)) :], path]
            message = "extends itself: " + " -> ".join(map(str, loop))
        elif len(chain) >= LONGEST_CHAIN:
            message = f"a chain of more than {LONGEST_CHAIN} files"
        else:
            try:
                return self.read(path, chain=chain)
            except SpecError as error:
                self._unreadable(item, path, error)
                return None
        self.problems.append(item.at.problem(message, key="extends"))
        self.whole = False
        return None

    def _unreadable(self, item: Node, path: Path, error: SpecError) -> None:
        self.whole = False
        for problem in error.problems:
            if problem.line is None:  # the file itself; blame the line that names it
                problem = item.at.problem(f"{path}: {problem.message}", key="extends")
            self.problems.append(problem)


def _check_root(root: Node) -> None:
    if root.broken:
        raise SpecError()
    if root.value is None:
        raise SpecError(root.at.problem("the file holds no keys; a spec needs at least `model:`"))
    if not isinstance(root.value, dict):
        kind = "list" if isinstance(root.value, list) else "value"
        raise SpecError(root.at.problem(f"a spec is a mapping of keys such as `model:`, and this is a {kind}"))
