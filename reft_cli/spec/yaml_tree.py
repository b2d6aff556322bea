"""YAML text as a tree of nodes that remember where they were written.

Built from the parser's events, because PyYAML's own composer knows no limits: an alias can blow a page up to gigabytes,
and a thousand brackets end in a RecursionError. Keys are always text. Which keys mean what is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from reft_cli.errors import Problem, SpecError
from reft_cli.spec.quoting import KeyPath, dotted, printable
from reft_cli.spec.scalars import Scalar, read_scalar
from reft_cli.spec.syntax import Mark, explain

DEEPEST = 20  # levels of nesting
LARGEST = 20_000  # values, aliases written out


Contained = yaml.ScalarEvent | yaml.SequenceStartEvent | yaml.MappingStartEvent


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a place in a file, a flag such as `--set train.seed=3`, or a suite."""

    file: str | None = None
    line: int | None = None
    column: int | None = None
    flag: str | None = None
    suite: str | None = None

    def at(self, mark: Mark | None) -> Origin:
        """The same file at a mark of the parser; a flag has no lines."""
        if self.flag or mark is None:
            return self
        return replace(self, line=mark.line + 1, column=mark.column + 1)

    def problem(self, message: str, *, key: str | None = None, hint: str | None = None) -> Problem:
        """A problem at this place."""
        return Problem(message, self.flag or self.file or self.suite, self.line, self.column, key, hint)


@dataclass(frozen=True)
class Node:
    """A value with its place.

    `at` is the place of its key (of itself in a list), `start` that of the value. `text` is a scalar as it was written,
    `plain` if it had no quotes. A broken node was reported already and has no value to check.
    """

    value: Scalar | dict[str, Node] | list[Node]
    at: Origin
    start: Origin
    text: str = ""
    plain: bool = False
    broken: bool = False
    size: int = 1
    depth: int = 1

    def child(self, part: str | int) -> Node | None:
        """The value at a key or list index, if there is one."""
        if isinstance(self.value, dict) and isinstance(part, str):
            return self.value.get(part)
        if isinstance(self.value, list) and isinstance(part, int) and 0 <= part < len(self.value):
            return self.value[part]
        return None

    def find(self, path: KeyPath) -> Node | None:
        """The value at a path, if there is one."""
        found: Node | None = self
        for part in path:
            found = found.child(part) if found is not None else None
        return found

    def plain_value(self) -> Any:  # noqa: ANN401  whatever the file held
        """The value as dicts, lists and scalars; broken ones are left out."""
        if isinstance(self.value, dict):
            return {key: node.plain_value() for key, node in self.value.items() if not node.broken}
        if isinstance(self.value, list):
            return [node.plain_value() for node in self.value if not node.broken]
        return self.value


def read_tree(text: str, *, source: Origin, problems: list[Problem]) -> Node:
    """The tree of a YAML document; null if it holds nothing.

    What can be read around is added to `problems` (duplicate keys, tags, …); SpecError where reading has to stop.
    """
    try:
        builder = _Builder(yaml.SafeLoader(text), source, problems)
    except yaml.reader.ReaderError as error:
        raise SpecError(_bad_character(text, error.position, source)) from None
    try:
        return builder.document()
    except yaml.MarkedYAMLError as error:
        message, mark = explain(error, text)
        raise SpecError(source.at(mark).problem(message)) from None
    except (ValueError, OverflowError):  # PyYAML on "\UFFFFFFFF" and on a %YAML directive of 5,000 digits
        mark = builder.loader.get_mark()
        raise SpecError(source.at(mark).problem("this is no character or number that exists")) from None


@dataclass
class _Builder:
    loader: yaml.SafeLoader
    source: Origin
    problems: list[Problem]
    anchors: dict[str, Node] = field(default_factory=dict)
    open_anchors: set[str] = field(default_factory=set)

    def document(self) -> Node:
        """The first document, after which the stream has to end."""
        self.loader.get_event()  # the start of the stream
        if self.loader.check_event(yaml.StreamEndEvent):
            top = self.source if self.source.flag else replace(self.source, line=1, column=1)
            return Node(None, top, top, plain=True)
        self.loader.get_event()  # the start of the document
        root = self.node(self.loader.get_event(), ())
        self.loader.get_event()  # its end
        event = self.loader.get_event()
        if not isinstance(event, yaml.StreamEndEvent):
            raise self.stop(event, "a second document starts here; a spec is one document", ())
        return replace(root, at=root.at if self.source.flag else replace(self.source, line=1, column=1))

    def stop(self, event: yaml.Event, message: str, path: KeyPath) -> SpecError:
        return SpecError(self.source.at(event.start_mark).problem(message, key=dotted(path) or None))

    def note(self, event: yaml.Event, message: str, path: KeyPath) -> None:
        self.problems.append(self.source.at(event.start_mark).problem(message, key=dotted(path) or None))

    def node(self, event: yaml.Event, path: KeyPath) -> Node:
        if len(path) >= DEEPEST:
            raise self.stop(event, f"nested more than {DEEPEST} levels deep", path[:3])
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, path)
        assert isinstance(event, Contained)
        name = event.anchor
        if name:
            self.open_anchors.add(name)
        made = self.contents(event, path)
        if made.size > LARGEST:
            raise self.stop(event, f"more than {LARGEST:,} values, with every alias written out", path)
        if len(path) + made.depth > DEEPEST + 1:
            raise self.stop(event, f"nested more than {DEEPEST} levels deep, with every alias written out", path)
        if name:
            self.open_anchors.discard(name)
            self.anchors[name] = made
        return made

    def contents(self, event: Contained, path: KeyPath) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            made = self.scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            made = self.sequence(event, path)
        else:
            made = self.mapping(event, path)
        if event.tag is None:
            return made
        tag = printable(event.tag.replace("tag:yaml.org,2002:", "!!"))
        self.note(event, f"tags such as `{tag}` have no meaning here; remove it", path)
        return replace(made, broken=True)

    def alias(self, event: yaml.AliasEvent, path: KeyPath) -> Node:
        name = event.anchor or ""
        if name in self.open_anchors:
            raise self.stop(event, f"`*{printable(name)}` stands for something that contains it", path)
        if name not in self.anchors:
            shown = printable(name)
            raise self.stop(event, f"`*{shown}` stands for nothing: no `&{shown}` comes before it", path)
        return replace(self.anchors[name], at=self.source.at(event.start_mark))

    def scalar(self, event: yaml.ScalarEvent) -> Node:
        here, plain = self.source.at(event.start_mark), event.style is None
        value = read_scalar(event.value) if plain else event.value
        return Node(value, here, here, text=event.value, plain=plain)

    def sequence(self, event: yaml.SequenceStartEvent, path: KeyPath) -> Node:
        here, items = self.source.at(event.start_mark), list[Node]()
        size = depth = 0
        while not isinstance(item := self.loader.get_event(), yaml.SequenceEndEvent):
            made = self.node(item, (*path, len(items)))
            items.append(made)
            size, depth = self.grown(item, path, size + made.size), max(depth, made.depth)
        return Node(items, here, here, size=size + 1, depth=depth + 1)

    def mapping(self, event: yaml.MappingStartEvent, path: KeyPath) -> Node:
        here, items = self.source.at(event.start_mark), dict[str, Node]()
        size = depth = 0
        while not isinstance(key := self.loader.get_event(), yaml.MappingEndEvent):
            name = self.key(key, path)
            made = self.node(self.loader.get_event(), (*path, name))
            size, depth = self.grown(key, path, size + made.size), max(depth, made.depth)
            if name in items:
                first = items[name].at
                where = f" (first on line {first.line})" if first.line else ""
                self.note(key, f"key given twice{where}", (*path, name))
            elif name == "<<" and key.style is None:
                self.note(
                    key,
                    "merge keys (`<<`) are not in YAML 1.2; write the keys out, or share them through `extends`",
                    (*path, name),
                )
            else:
                items[name] = replace(made, at=self.source.at(key.start_mark))
        return Node(items, here, here, size=size + 1, depth=depth + 1)

    def grown(self, event: yaml.Event, path: KeyPath, size: int) -> int:
        if size > LARGEST:
            raise self.stop(event, f"more than {LARGEST:,} values, with every alias written out", path)
        return size

    def key(self, event: yaml.Event, path: KeyPath) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            raise self.stop(event, "a key has to be a plain word", path)
        if event.tag is not None or event.anchor is not None:
            raise self.stop(event, "a key has to be a plain word, without tag or anchor", path)
        if not event.value:
            raise self.stop(event, "there is no key before the `:`", path)
        return str(event.value)


def _bad_character(text: str, position: int, source: Origin) -> Problem:
    before = text[:position]
    line, column = before.count("\n") + 1, position - (before.rfind("\n") + 1) + 1
    here = source if source.flag else replace(source, line=line, column=column)
    return here.problem(f"the character U+{ord(text[position]):04X} is not allowed in YAML")
