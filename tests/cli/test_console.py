"""The streams: what a pipe and what a terminal gets."""

import io
import os
import sys

import datasets
import huggingface_hub
import pytest
import transformers
from stand_ins import Terminal

from reft_cli.cli import console
from reft_cli.cli.options import _no_progress, _quiet, _verbose


def test_a_table_in_a_pipe_is_plain_and_whole(capsys):
    long = "x" * 300
    console.result_table(["name", "value"], [["[bold]a[/bold]", 1], [long, None]], right=["value"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "value"]
    assert lines[1].startswith("[bold]a[/bold] ") and lines[1].endswith(" 1")
    assert lines[2] == long


def test_a_table_on_a_terminal_fits_it(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    console.result_table(["name"], [["x" * 60]])
    assert "\x1b[1m" in screen.getvalue()
    assert screen.getvalue().count("x") == 60
    assert all(len(line) <= 50 for line in screen.getvalue().splitlines())


def test_on_a_narrow_terminal_names_and_numbers_stay_whole(monkeypatch):
    """At 80 columns `exact_match` was broken in the middle, and so were the names of runs and splits."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "48")
    row = ["runs/validation", "some words that are long", "0.8125", "12,345"]
    console.result_table(["run", "model", "exact_match", "prompt p50"], [row], right=["exact_match", "prompt p50"])
    lines = screen.getvalue().splitlines()
    assert all(word in screen.getvalue() for word in ("runs/validation", "exact_match", "0.8125", "12,345", "prompt"))
    assert [line.split()[-1] for line in lines[2:]] == ["12,345", "are", "long"]
    screen.truncate(0)
    console.result_table(["name", "value"], [["x" * 60, "y" * 60]])  # where that is not possible, nothing is lost
    assert (screen.getvalue().count("x"), screen.getvalue().count("y")) == (60, 60)


def test_a_table_without_headers_has_no_empty_line(capsys):
    console.result_table(["", ""], [["a", "b"]])
    assert capsys.readouterr().out == "a  b\n"


def test_json_is_one_line_and_strict(capsys):
    console.result_json({"text": "ä\nb"})
    assert capsys.readouterr().out == '{"text": "ä\\nb"}\n'
    console.result_json({"score": float("nan")})
    assert capsys.readouterr().out == '{"score": null}\n'


def test_a_character_that_the_stream_lacks_is_replaced(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    console.reset([])
    console.result("ä")
    assert narrow.buffer.getvalue() == b"?\n"


@pytest.fixture
def bars_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries as they are if imported before the program could say anything."""
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)
    hub, sets = (sys.modules[f"{name}.utils.tqdm"] for name in ("huggingface_hub", "datasets"))
    monkeypatch.setattr(hub, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(hub, "progress_bar_states", {})
    monkeypatch.setattr(sets, "HF_DATASETS_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(sets, "_hf_datasets_progress_bars_disabled", False)
    for name in console.BARS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("bars_on")
def test_bars_of_libraries_that_are_imported_already_stand_still():
    console.reset([])
    assert not transformers.utils.logging.is_progress_bar_enabled()
    assert huggingface_hub.utils.are_progress_bars_disabled()
    assert datasets.are_progress_bars_disabled()


@pytest.mark.usefixtures("bars_on")
@pytest.mark.parametrize(
    ("words", "terminal", "moving"),
    [
        ([], True, False),
        (["-v"], False, False),
        (["-v"], True, True),
        (["-v", "-q"], True, False),
        (["--no-progress", "-v"], True, False),
        (["-v", "--no-progress"], True, False),
    ],
)
def test_bars_of_libraries_to_come_move_for_a_person_who_wants_to_see_all(monkeypatch, words, terminal, moving):
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    monkeypatch.setenv("TERM", "xterm")
    console.reset(words)
    for word in words:
        {"-v": _verbose, "-q": _quiet, "--no-progress": _no_progress}[word](True)
    assert [name in os.environ for name in console.BARS] == [not moving] * 2
    console.reset([])
