"""A loaded spec: every key filled, and where each value came from; as YAML that loads again to the same spec."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from reft_cli.spec.environment import escape
from reft_cli.spec.quoting import KeyPath, printable, yaml_inline
from reft_cli.spec.schema import Spec
from reft_cli.spec.yaml_tree import Origin
from reft_cli.suites import Preset

INDENT = "  "


@dataclass(frozen=True)
class LoadedSpec:
    """A spec and where it came from.

    `text` is the file as it was written. `origins` has the place of every key and list item that was given; what is
    not in it is a default. The spec's `extends` is empty: what it named is merged. `preset` is what lies below it all.
    """

    spec: Spec
    path: Path
    text: str
    origins: Mapping[KeyPath, Origin]
    preset: Preset | None = None

    @property
    def of_the_suite(self) -> tuple[list[str], list[str]]:
        """(keys whose value is the suite's, keys of the suite that the spec replaced), dotted."""
        keys = [default.key for default in self.preset.defaults] if self.preset else []
        places = {key: self.origins.get(tuple(key.split("."))) for key in keys}
        kept = [key for key, place in places.items() if place is not None and place.suite]
        return kept, [key for key in keys if key not in kept]

    def run_path(self, *, output: Path | None = None, name: str | None = None) -> Path:
        """The run folder: flags, then `output` and `name` of the spec, then the spec file's name."""
        return output or Path(self.spec.output.format(name=name or self.spec.name or self.path.stem))


def resolved_yaml(loaded: LoadedSpec) -> str:
    """YAML of every key, one a line, with a comment: `train.yaml:4`, `--set train.seed=3`, a suite or `default`."""
    return aligned(list(_rows(loaded, loaded.spec, ())))


def aligned(rows: Sequence[tuple[str, str]]) -> str:
    """Lines with their comments below each other."""
    width = min(max(len(left) for left, _ in rows), 60)
    return "".join(f"{left:<{width}}  # {comment}\n" if comment else f"{left}\n" for left, comment in rows)


def _rows(loaded: LoadedSpec, section: BaseModel, path: KeyPath) -> Iterator[tuple[str, str]]:
    """(line, comment) of every key; the line that opens a section has no comment."""
    for name in type(section).model_fields:
        value, here = getattr(section, name), (*path, name)
        margin = INDENT * len(path) + name + ":"
        if isinstance(value, BaseModel):
            yield margin, ""
            yield from _rows(loaded, value, here)
        else:
            yield f"{margin} {yaml_inline(_escaped(_plain(value)))}", _comment(loaded, here)


def _plain(value: Any) -> Any:  # noqa: ANN401  a scalar, list or mapping, with sections in lists
    """Sections in a list as mappings of the keys that differ from their defaults."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.model_dump(exclude_defaults=True) if isinstance(value, BaseModel) else value


def _escaped(value: Any) -> Any:  # noqa: ANN401  a scalar, list or mapping of scalars
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, Mapping):
        return {key: _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list) else value


def _comment(loaded: LoadedSpec, path: KeyPath) -> str:
    """The place of a key; where a list or mapping was put together, the first place in each file or flag."""
    if path == ("extends",):
        files = {origin.file for origin in loaded.origins.values() if origin.file}
        return "merged" if files - {str(loaded.path)} else "default"
    places: dict[str | None, str] = {}
    for key, origin in loaded.origins.items():
        if key[: len(path)] == path:
            places.setdefault(origin.flag or origin.file or origin.suite, _name(origin, loaded))
    return ", ".join(places.values()) or "default"


def _name(origin: Origin, loaded: LoadedSpec) -> str:
    if origin.file is None:
        return origin.flag or origin.suite or ""
    file = os.path.relpath(origin.file, loaded.path.parent)
    return printable(f"{file}:{origin.line}", limit=200)
