"""Reads JSON and YAML that may be damaged or meant to harm: regular files of a bounded size, no aliases, known kinds.

Whatever is wrong is a CheckpointError of one line that names the file. Nothing heavy is imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml

from reft_cli.errors import CheckpointError

LARGEST = 2**24  # bytes of a JSON or YAML file; those that reft writes have some thousand
LARGEST_YAML = 2**20
LARGEST_LOG = 2**30
DEEPEST = 50  # levels of YAML
OPENING = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


class Moment(str):
    """A date and time as text, for kinds."""


def read_bytes(path: Path, *, largest: int | None = None) -> bytes:
    """A regular file's bytes; no pipe or device, which may never end."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is not a regular file")
        if largest is not None and path.stat().st_size > largest:
            raise CheckpointError(f"{path}: damaged: larger than any that reft writes")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {(error.strerror or 'cannot be read').lower()}") from error


def read_text(path: Path, *, largest: int = LARGEST) -> str:
    """A regular file of UTF-8 text."""
    try:
        return read_bytes(path, largest=largest).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: damaged: not UTF-8 text") from error


def parse_json(text: str, *, where: str) -> Any:  # noqa: ANN401  any JSON value
    """A JSON value."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: damaged: not JSON") from error


def read_json(path: Path) -> Any:  # noqa: ANN401  any JSON value
    """The JSON value in a file."""
    return parse_json(read_text(path), where=str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file that reft wrote: without aliases, which can stand for more than any memory holds."""
    text, depth = read_text(path, largest=LARGEST_YAML), 0
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
            if depth > DEEPEST or isinstance(token, yaml.AliasToken):
                raise CheckpointError(f"{path}: damaged: nested too deeply, or with aliases; reft writes neither")
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: not YAML") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: damaged: not a mapping of keys")
    return found


def check_kinds(values: Mapping[str, Any], kinds: Mapping[str, Any], *, where: str) -> None:
    """CheckpointError if a value that is there is of another kind; keys that are not known pass."""
    for key, kind in kinds.items():
        if key in values and not _is(values[key], kind):
            raise CheckpointError(f"{where}: damaged: {key} is not what reft writes there")


def _is(value: object, kind: Any) -> bool:  # noqa: ANN401  a type, a union or a generic of types
    if isinstance(kind, UnionType):
        return any(_is(value, each) for each in get_args(kind))
    if kind is Moment:
        return isinstance(value, str) and _is_moment(value)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool) and _is_writable(value)
    if kind is Any:
        return True
    origin = get_origin(kind)
    if origin is list:
        return isinstance(value, list) and all(_is(each, get_args(kind)[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(each, get_args(kind)[1]) for each in value.values())
    return isinstance(value, kind)


def _is_writable(value: float) -> bool:
    """Neither infinite nor so large that no clock or counter came to it."""
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63


def _is_moment(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False
