"""What a result was made with: versions, and the commit of the working directory. Nothing heavy is imported for it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from reft_cli import __version__

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "safetensors")
SECRET = re.compile(r"(TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
SHORTEST_SECRET = 8  # characters; a shorter value is a switch, and would be blotted out of harmless words
TOKEN = re.compile(r"\b(hf_|sk-|ghp_|gho_|github_pat_|glpat-)[A-Za-z0-9_-]{8,}")


def versions() -> dict[str, str | None]:
    """Versions of Python, reft and what it computes with; None for what is not installed."""
    return {"python": platform.python_version(), "reft": __version__} | {name: _version(name) for name in LIBRARIES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """{commit, dirty} of the repository around `folder`, dirty by tracked files; None outside of one."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def blotted(text: str) -> str:
    """A text without access tokens: those of a known form, and the values of environment variables named like one."""
    values = {value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= SHORTEST_SECRET}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return TOKEN.sub(r"\1***", text)
