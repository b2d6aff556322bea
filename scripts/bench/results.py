"""Keeps what a benchmark found so far, so that a run that is cut loses no finished row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def keep(found: Mapping[str, object], text: str, *, output: Path | None, markdown: Path | None = None) -> None:
    """Write the results as JSON and the table as text, each if somebody wants it."""
    if output:
        output.write_text(json.dumps(found, indent=2) + "\n")
    if markdown:
        markdown.write_text(text)
