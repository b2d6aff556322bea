"""The streams: what a pipe and what a terminal gets."""

import io
import sys

from stand_ins import Terminal

from reft_cli.cli import console


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
