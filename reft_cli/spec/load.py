"""A spec from its file, the files it extends, `--set` flags and its suite, checked; all problems are told at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from reft_cli.errors import Problem, SpecError
from reft_cli.spec.environment import substitute
from reft_cli.spec.layering import Layers
from reft_cli.spec.overrides import flag_name, override
from reft_cli.spec.problems import validate
from reft_cli.spec.quoting import KeyPath
from reft_cli.spec.resolved import LoadedSpec, resolved_yaml
from reft_cli.spec.suite import over_suite, shorthands_written_out
from reft_cli.spec.yaml_tree import Node, Origin

__all__ = ["LoadedSpec", "Origin", "load_spec", "resolved_yaml"]


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
