"""Files that are there whole or as they were, and JSON that any reader takes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from reft_cli.writing import json_line, json_text, write_atomic


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "run.json"
    write_atomic(file, "old é")

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(file, "new")
    assert file.read_text(encoding="utf-8") == "old é" and list(tmp_path.iterdir()) == [file]


def test_what_is_no_number_is_null():
    value = {"loss": float("nan"), "by": {1: (float("-inf"), 0.5, "é")}}
    assert json_line(value) == '{"loss": null, "by": {"1": [null, 0.5, "é"]}}\n'
    assert json.loads(json_text(value)) == json.loads(json_line(value))
