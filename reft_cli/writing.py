"""Writes files so that a crash leaves the old one or the new one and never a part; JSON without NaN and infinity."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_synced(path: Path, data: bytes) -> None:
    """Write a file that is on the disk when this returns."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Put names that were made, changed or deleted in a folder on the disk, where that is apart from the files."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash, sees the old text or the new one and never a part."""
    new = path.with_name(f".{path.name}.tmp")
    try:
        write_synced(new, text.encode())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)  # a full disk needs the room
    sync_folder(path.parent)


def json_text(value: object) -> str:
    """A JSON value as a page to read; NaN and infinity are null."""
    return json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n"


def json_line(value: object) -> str:
    """The same on one line."""
    return json.dumps(finite(value), ensure_ascii=False) + "\n"


def finite(value: Any) -> Any:  # noqa: ANN401  any JSON value
    """The same value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
