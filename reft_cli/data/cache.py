"""Encoded rows kept on disk under what they were made of, so that the same data is tokenized once.

An entry is one safetensors file named by its key: the columns of `Examples`, and in its header the counts, the classes
and a checksum. It is written under another name and renamed, so any number of processes may read and write at once. A
damaged one counts as none and is written anew. Nothing here ends a run: what cannot be written is not kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from reft_cli.data.download import shared_cache
from reft_cli.data.encode import Counts, Encoded, Notice
from reft_cli.data.examples import Examples

VARIABLE = "REFT_CACHE"
OFF = "off"
LIMIT = 4 << 30  # bytes; the entries not used for longest go when there are more
ABANDONED = 24 * 3600  # seconds after which an unfinished file belongs to nobody
SUFFIX, UNFINISHED = ".safetensors", ".tmp"
DAMAGE = (
    OSError,
    SafetensorError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
)  # what reading anything but an entry may raise

Tell = Callable[[str], None]


def silent(_: str) -> None:
    """Hears a line and says nothing."""


def cache_folder() -> Path | None:
    """$REFT_CACHE, else `reft` in $XDG_CACHE_HOME or ~/.cache; None if $REFT_CACHE is `off` or there is no home."""
    given = os.environ.get(VARIABLE, "")
    if given == OFF:
        return None
    try:
        return Path(given).expanduser().absolute() if given else shared_cache()
    except RuntimeError:  # a user without a home
        return None


def cache_size() -> int:
    """Bytes of all entries."""
    folder = cache_folder()
    return 0 if folder is None else sum(stat.st_size for _, stat in _files(folder / "encoded", SUFFIX))


def cached(name: str, *, key: str, make: Callable[[], Encoded], tell: Tell) -> Encoded:
    """What was kept under `key`, its rows now called `name`; else what `make` returns, which is kept.

    `tell` gets a line about a hit and about why nothing can be kept; errors of `make` go through.
    """
    folder = cache_folder()
    if folder is None:
        return make()
    path = folder / "encoded" / f"{key}{SUFFIX}"
    found = _read(path, name)
    if found is not None:
        with contextlib.suppress(OSError):  # its time of use, in a folder that may be read-only
            os.utime(path)
        tell(f"{name}: tokens from {path}")
        return found
    made = make()
    try:
        _write(path, made)
        _prune(path.parent, newest=path)
    except (OSError, SafetensorError) as error:
        tell(f"{name}: tokens are not kept: {error}")
    return made


def _read(path: Path, name: str) -> Encoded | None:
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            columns = {column: file.get_tensor(column) for column in file.keys()}
        if header["checksum"] != _checksum(columns, header["facts"]):
            return None
        facts = json.loads(header["facts"])
        counts: dict[str, Any] = facts["counts"]
        counts |= {key: Notice(**value) for key, value in counts.items() if isinstance(value, dict)}
        classes = None if facts["classes"] is None else tuple(facts["classes"])
        return Encoded(name, Examples.from_columns(columns), Counts(**counts), classes)
    except DAMAGE:
        return None


def _write(path: Path, encoded: Encoded) -> None:
    columns = Examples.of(encoded.examples).columns()
    facts = json.dumps({"counts": asdict(encoded.counts), "classes": encoded.classes})
    header = {"facts": facts, "checksum": _checksum(columns, facts)}
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # rows may be private
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, suffix=UNFINISHED)
    os.close(descriptor)
    try:
        save_file(columns, unfinished, metadata=header)
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _checksum(columns: dict[str, NDArray[np.generic]], facts: str) -> str:
    total = zlib.crc32(facts.encode())
    for name in sorted(columns):
        column = np.ascontiguousarray(columns[name])
        total = zlib.crc32(f"{name} {column.dtype} {column.shape}".encode(), total)
        total = zlib.crc32(column.view(np.uint8).reshape(-1).data if column.size else b"", total)
    return f"{total:08x}"


def _prune(folder: Path, *, newest: Path) -> None:
    """Delete the entries not used for longest until they are within LIMIT; the newest stays whatever its size."""
    for path, stat in _files(folder, UNFINISHED):
        if time.time() - stat.st_mtime > ABANDONED:
            path.unlink(missing_ok=True)
    entries = sorted(_files(folder, SUFFIX), key=lambda entry: entry[1].st_mtime)
    total = sum(stat.st_size for _, stat in entries)
    for path, stat in entries:
        if total > LIMIT and path != newest:
            path.unlink(missing_ok=True)
            total -= stat.st_size


def _files(folder: Path, suffix: str) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob(f"*{suffix}"):
        with contextlib.suppress(FileNotFoundError):  # another process deleted it
            yield path, path.stat()
