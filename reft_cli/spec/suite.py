"""The lowest layer of a spec: the suite that `task` names, below the file and everything that the file extends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args

from reft_cli.errors import Problem
from reft_cli.spec.layering import SOURCES, merge, written_out
from reft_cli.spec.quoting import listed, printable
from reft_cli.spec.schema import Method
from reft_cli.spec.yaml_tree import Node, Origin
from reft_cli.suites import SUITES, Default, Preset, Suite, preset

# A mapping with one of these keys is no part of the suite's mapping, but one of its own.
WHOLE: dict[tuple[str, ...], tuple[str, ...]] = {
    ("data", "template"): ("completion",),
    **dict.fromkeys(SOURCES, ("path", "local")),
}


def shorthands_written_out(root: Node) -> Node:
    """The tree with `model` and `task` as mappings, where they are strings."""
    root = _changed(root, ("model",), lambda node: written_out(node, path=("model",)))
    return _changed(root, ("task",), lambda node: written_out(node, path=("task",)))


def over_suite(root: Node, *, problems: list[Problem]) -> tuple[Node, Preset | None]:
    """(the tree over its suite's values, what those are); the tree itself if it names no suite that there is."""
    name = _value(root, "task", "suite")
    suite = SUITES.get(name) if isinstance(name, str) else None
    if suite is None:
        return root, None
    given = _value(root, "intervention", "method")
    method = given if given in get_args(Method) else "loreft"
    recipe = _value(root, "task", "recipe")
    chosen = preset(suite, method=method, recipe=recipe if isinstance(recipe, str) else None)
    if chosen is None:
        problems.append(_no_recipe(root, suite, method))
        chosen = preset(suite, method=method)
        assert chosen is not None, "every suite has something for every method"
    base = _less_replaced(_tree(chosen), root)
    return merge(base, _in_each_source(base, root)), chosen


def _no_recipe(root: Node, suite: Suite, method: str) -> Problem:
    node = root.find(("task", "recipe"))
    assert node is not None, "a recipe that is not there cannot be wrong"
    known = [each.name for each in suite.recipes_of(method)]
    there = f"write {listed(known)}" if known else "there is none; remove it"
    shown = printable(str(node.value))
    return node.at.problem(f"`{shown}` is no recipe of {suite.name} for {method}; {there}", key="task.recipe")


def _tree(chosen: Preset) -> Node:
    root = Node({}, Origin(suite=f"suite {chosen.suite.name}"), Origin())
    for default in chosen.defaults:
        root = _put(root, default.key.split("."), default, chosen.suite)
    return root


def _put(node: Node, path: list[str], default: Default, suite: Suite) -> Node:
    here = Origin(suite=f"suite {suite.name} ({default.source})")
    if not path:
        return _node(default.value, here)
    assert isinstance(node.value, dict)
    inner = node.value.get(path[0], Node({}, here, here))
    return replace(node, value={**node.value, path[0]: _put(inner, path[1:], default, suite)})


def _node(value: Any, here: Origin) -> Node:  # noqa: ANN401  a plain value
    if isinstance(value, Mapping):
        return Node({key: _node(item, here) for key, item in value.items()}, here, here)
    if isinstance(value, list):
        return Node([_node(item, here) for item in value], here, here)
    return Node(value, here, here, text=str(value), plain=not isinstance(value, str))


def _less_replaced(base: Node, root: Node) -> Node:
    """The suite's tree without the mappings that the user's take the place of."""
    for path, keys in WHOLE.items():
        user = root.find(path)
        if user is not None and isinstance(user.value, dict) and any(key in user.value for key in keys):
            base = _changed(base, path, lambda node: Node({}, node.at, node.start))
    if _value(root, "data", "format") is not None:  # columns have the names of a format
        base = _changed(base, ("data", "columns"), lambda node: Node({}, node.at, node.start))
    return base


def _in_each_source(base: Node, root: Node) -> Node:
    """The user's tree with keys of a source written into each of the suite's sources, where those are several."""
    for path in SOURCES:
        several = base.find(path)
        if several is not None and isinstance(several.value, list):
            items = several.value

            def spread(user: Node, items: list[Node] = items) -> Node:
                value = [merge(item, user) for item in items] if isinstance(user.value, dict) else user.value
                return replace(user, value=value)

            root = _changed(root, path, spread)
    return root


def _changed(root: Node, path: tuple[str, ...], change: Callable[[Node], Node]) -> Node:
    """The tree with `change` applied to the node at `path`, if there is one."""
    if not path:
        return change(root)
    inner = root.child(path[0])
    if inner is None or not isinstance(root.value, dict):
        return root
    return replace(root, value={**root.value, path[0]: _changed(inner, path[1:], change)})


def _value(root: Node, section: str, key: str) -> Any:  # noqa: ANN401  whatever the file held
    found = root.find((section, key))
    return found.value if found and not found.broken else None
