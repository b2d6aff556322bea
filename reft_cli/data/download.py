"""Files at an https address, downloaded once and kept: `$XDG_CACHE_HOME/reft/downloads`, else below ~/.cache."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.request
from pathlib import Path

from reft_cli.errors import DataError, first_line

SECONDS = 60  # without a byte


def fetch(address: str) -> Path:
    """The file at an address. DataError: it cannot be had, or HF_HUB_OFFLINE=1 and it was never downloaded."""
    try:
        folder = shared_cache() / "downloads"
    except RuntimeError as error:
        raise DataError(f"{address}: there is no home folder to keep it below; set XDG_CACHE_HOME") from error
    path = folder / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{address.rpartition('/')[2]}"
    if path.exists():
        return path
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise DataError(f"{address}: was never downloaded, and HF_HUB_OFFLINE is set; give a copy (data.folder)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            part = Path(place) / "part"
            with urllib.request.urlopen(address, timeout=SECONDS) as response, part.open("wb") as file:
                if not response.url.startswith("https://"):
                    raise DataError(f"{address}: leads to {response.url}, which is no https address")
                shutil.copyfileobj(response, file)
            part.replace(path)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(f"{address}: cannot be downloaded: {first_line(error)}") from error
    return path


def shared_cache() -> Path:
    """`reft` in $XDG_CACHE_HOME, which counts if it is absolute, or ~/.cache. RuntimeError: a user without a home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "reft"
