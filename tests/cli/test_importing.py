"""What a command imports is kept out of the garbage collector's way, once, and the collector is on again."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from reft_cli.cli import importing as imports
from reft_cli.cli.importing import importing


@pytest.fixture
def thawed():
    """Nothing is frozen before and after."""
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_the_collector_rests_while_importing_and_forgets_what_came(thawed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(imports, "VERBS", "not.imported")
    with importing():
        assert not gc.isenabled()
        assert gc.get_freeze_count() == 0
    assert gc.isenabled() and gc.get_freeze_count() > 1000


def test_a_failed_import_leaves_the_collector_on(thawed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(imports, "VERBS", "not.imported")
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


def test_nothing_happens_the_second_time(thawed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(imports, "VERBS", "json")
    with importing():
        assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_who_has_no_collector_gets_none(thawed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(imports, "VERBS", "not.imported")
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled() and gc.get_freeze_count() == 0
    finally:
        gc.enable()


def test_a_command_imports_this_way():
    """Of a program of its own, for here everything is imported already."""
    program = """
import gc, sys
from reft_cli.cli.app import _run
assert _run(["infer", "nowhere", "--prompt", "Yes?"]) == 4, "no such run"
assert "torch" in sys.modules and gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, capture_output=True)
