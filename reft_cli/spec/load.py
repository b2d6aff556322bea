"""A spec from its file, the files it extends, `--set` flags and its suite, checked; all problems are told at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reft_cli.errors import Problem, SpecError
from reft_cli.spec.environment import substitute, unusable
from reft_cli.spec.layering import Layers
from reft_cli.spec.overrides import flag_name, override
from reft_cli.spec.problems import validate
from reft_cli.spec.quoting import KeyPath, dotted
from reft_cli.spec.resolved import LoadedSpec, resolved_yaml
from reft_cli.spec.schema import Spec
from reft_cli.spec.suite import over_suite, shorthands_written_out
from reft_cli.spec.yaml_tree import DEEPEST, Node, Origin

__all__ = ["LoadedSpec", "Origin", "load_spec", "parse_spec", "resolved_yaml"]


def load_spec(path: Path, *, overrides: Sequence[str] = ()) -> LoadedSpec:
    """Read, layer and check a spec; `overrides` are `key.path=value`. SpecError holds all problems, in file order."""
    path = Path(path)
    layers = Layers()
    try:
        root = layers.read(path)
    except SpecError as error:
        raise SpecError(*_in_order([*layers.problems, *error.problems], [*layers.texts])) from None
    problems = layers.problems
    root = override(root, overrides, problems=problems)
    root = shorthands_written_out(substitute(root, problems=problems))
    root, preset = over_suite(root, problems=problems)
    spec = validate(root, problems=problems) if layers.whole else None
    if spec is None:
        raise SpecError(*_in_order(problems, [*layers.texts, *map(flag_name, overrides)]))
    return LoadedSpec(spec, path, layers.texts[str(path)], dict(_origins(root)), preset)


def parse_spec(tree: Mapping[str, Any], *, name: str) -> Spec:
    """Check a spec that is merged already, such as the one a run folder holds; `name` is what messages call it."""
    problems: list[Problem] = []
    root = shorthands_written_out(_node(tree, Origin(file=name), problems))
    if not isinstance(root.value, dict):
        raise SpecError(root.at.problem("a spec is a mapping of keys such as `model:`"))
    spec = validate(root, problems=problems)
    if spec is not None and spec.extends:
        problems.append(root.at.problem("only a file can extend others", key="extends"))
    if spec is None or problems:
        raise SpecError(*problems)
    return spec


def _node(value: Any, here: Origin, problems: list[Problem], path: KeyPath = ()) -> Node:  # noqa: ANN401  JSON
    if len(path) > DEEPEST:
        raise SpecError(here.problem(f"nested more than {DEEPEST} levels deep", key=dotted(path[:3])))
    if isinstance(value, Mapping):
        return Node(
            {str(key): _node(item, here, problems, (*path, str(key))) for key, item in value.items()}, here, here
        )
    if isinstance(value, list | tuple):
        return Node([_node(item, here, problems, (*path, index)) for index, item in enumerate(value)], here, here)
    if not isinstance(value, str):
        words = {None: "null", True: "true", False: "false"}
        text = words[value] if value is None or isinstance(value, bool) else repr(value)
        return Node(value, here, here, text=text, plain=True)
    fault = unusable(value)
    if fault:
        problems.append(here.problem(fault, key=dotted(path)))
    return Node(value, here, here, text=value, broken=fault is not None)


def _origins(node: Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Origin]]:
    if path:
        yield path, node.at
    items: Iterable[tuple[str | int, Node]] = ()
    if isinstance(node.value, dict):
        items = node.value.items()
    elif isinstance(node.value, list):
        items = enumerate(node.value)
    for part, item in items:
        yield from _origins(item, (*path, part))


def _in_order(problems: Sequence[Problem], sources: Sequence[str]) -> list[Problem]:
    """Each problem once: the file itself, the files it extends, flags; by line and column within."""
    rank = {file: number for number, file in enumerate(sources)}
    return sorted(
        dict.fromkeys(problems),
        key=lambda problem: (rank.get(problem.file or "", len(rank)), problem.line or 0, problem.column or 0),
    )
