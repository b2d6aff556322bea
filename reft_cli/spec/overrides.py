"""`--set key.path=value`: the topmost layer. It splits at the first `=`; the value is YAML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reft_cli.errors import Problem, SpecError
from reft_cli.spec.layering import written_out
from reft_cli.spec.quoting import KeyPath, dotted, printable
from reft_cli.spec.yaml_tree import DEEPEST, Node, Origin, read_tree


def override(root: Node, flags: Sequence[str], *, problems: list[Problem]) -> Node:
    """The tree with every `key.path=value` of `flags` set, the last one winning."""
    for flag in flags:
        source = Origin(flag=flag_name(flag))
        key, sign, text = flag.partition("=")
        path = tuple(key.strip().split("."))
        if not sign or not all(path):
            problems.append(source.problem("write it as key.path=value, such as train.epochs=5"))
        elif path[0] == "extends":
            problems.append(source.problem("only a file can extend others", key="extends"))
        elif len(path) > DEEPEST:
            problems.append(source.problem(f"no key lies more than {DEEPEST} levels deep"))
        else:
            root = _apply(root, path, text, source, problems)
    return root


def flag_name(flag: str) -> str:
    """What messages call a flag."""
    return f"--set {printable(flag, limit=200)}"


def _apply(root: Node, path: tuple[str, ...], text: str, source: Origin, problems: list[Problem]) -> Node:
    found: list[Problem] = []
    try:
        value = read_tree(text, source=source, problems=found)
        return _put(root, path, value, ())
    except SpecError as error:
        found += error.problems
        return root
    finally:
        problems += [replace(problem, key=dotted(path)) for problem in found]


def _put(node: Node, path: tuple[str, ...], value: Node, above: KeyPath) -> Node:
    """The node with `value` at `path`; sections on the way are made. SpecError: something on the way is a value."""
    if not path:
        return value
    part, rest = path[0], path[1:]
    node = written_out(node, path=above)
    here: KeyPath = (*above, part)
    if isinstance(node.value, list):
        index = int(part) if part.isdecimal() and len(part) < 9 else -1
        old = node.child(index)
        if old is None:
            raise SpecError(value.at.problem(f"`{dotted(above)}` is a list of {len(node.value)}, counted from 0"))
        return replace(node, value=[*node.value[:index], _put(old, rest, value, here), *node.value[index + 1 :]])
    if node.value is not None and not isinstance(node.value, dict):
        raise SpecError(value.at.problem(f"`{dotted(above)}` is a value, not a section"))
    items = node.value or {}
    old = items.get(part, Node(None, value.at, value.at))
    return replace(node, value={**items, part: _put(old, rest, value, here)})
