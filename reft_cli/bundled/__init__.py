"""What ships inside the package: the path behind `bundled:NAME`.

A model is a folder here with a config.json; a data set is a folder of .jsonl files, one a split. Nothing is read here.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from reft_cli.errors import DataError, ModelError

Kind = Literal["model", "data"]
PREFIX = "bundled:"
ROOT = Path(__file__).parent


def is_bundled(name: str) -> bool:
    """Whether `name` is one for `locate`: it begins with `bundled:`."""
    return name.startswith(PREFIX)


def names(kind: Kind | None = None) -> tuple[str, ...]:
    """Everything that is bundled, or all models or all data of it, as one writes it in a spec."""
    return tuple(PREFIX + name for name, path in _contents().items() if kind in (None, _kind(path)))


def locate(name: str, *, kind: Kind | None = None) -> Path:
    """The folder of a bundled model or data set, or the file of a split such as `bundled:reviews/train`.

    With `kind`, only names of that kind are known. Unknown names raise ModelError or DataError: that of `kind`, without
    one that of the nearest name.
    """
    short = name.removeprefix(PREFIX)
    found = _contents().get(short)
    if found is not None and kind in (None, _kind(found)):
        return found
    raise _unknown(short, kind=kind)


def _contents() -> dict[str, Path]:
    """Short name -> path, in alphabetical order."""
    models = {file.parent.name: file.parent for file in ROOT.glob("*/config.json")}
    splits = {f"{file.parent.name}/{file.stem}": file for file in ROOT.glob("*/*.jsonl")}
    folders = {file.parent.name: file.parent for file in splits.values()}
    return dict(sorted((models | splits | folders).items()))


def _kind(path: Path) -> Kind:
    return "model" if (path / "config.json").exists() else "data"


def _unknown(short: str, *, kind: Kind | None) -> ModelError | DataError:
    known = names(kind)
    near = get_close_matches(short, [name.removeprefix(PREFIX) for name in known], n=1)
    meant = kind or _kind(_contents()[near[0]] if near else ROOT)
    what = {"model": "model", "data": "data set", None: "model or data set"}[kind]
    hint = f"did you mean `{PREFIX}{near[0]}`? " if near else ""
    message = f"`{PREFIX}{short}` is no bundled {what}; {hint}there are: {', '.join(known)}"
    return ModelError(message) if meant == "model" else DataError(message)
