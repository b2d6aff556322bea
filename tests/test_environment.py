"""Versions without imports, and command lines without secrets."""

import platform
import subprocess
import sys

import pytest
import torch

from reft_cli import __version__, environment
from reft_cli.environment import blotted, versions


def test_versions_are_those_that_are_installed():
    found = versions()
    assert found["python"] == platform.python_version() and found["reft"] == __version__
    assert found["torch"] == torch.__version__


def test_what_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(environment, "LIBRARIES", ("no-such-library",))
    assert versions()["no-such-library"] is None


def test_nothing_is_imported_for_them():
    code = "import sys; from reft_cli.environment import versions; versions(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("hf_abcdefghij", "hf_***"),
        ("url=https://user:hf_abcdefghij@host", "url=https://user:hf_***@host"),
        ("github_pat_abcdefghij", "github_pat_***"),
        ("train.epochs=5", "train.epochs=5"),
        ("hf_short", "hf_short"),
        ("risk-averse-model", "risk-averse-model"),
    ],
)
def test_tokens_are_blotted_out(word, shown):
    assert blotted(word) == shown
