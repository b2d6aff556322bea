"""The program's frame: exit codes, streams, errors as text and as JSON, the report of a bug."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from reft_cli import __version__
from reft_cli.cli import console, options
from reft_cli.cli.app import app
from reft_cli.errors import (
    BelowThreshold,
    CheckpointError,
    DataError,
    Diverged,
    Interrupted,
    MemoryExhausted,
    ModelError,
    Problem,
    SpecError,
)


@pytest.fixture
def command(monkeypatch):
    """Adds a command `boom` that raises what it is given."""
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))

    def add(raise_it):
        @app.command("boom")
        def boom(as_json: bool = typer.Option(False, "--json")) -> None:
            raise_it()

    def thrower(error):
        def throw():
            raise error

        add(throw)

    return thrower


def test_the_version(reft):
    assert reft("--version").out == f"reft {__version__}\n"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_goes_to_stdout(reft, flag):
    done = reft(flag)
    assert done.code == 0 and done.err == ""
    for name in ("init", "schema", "doctor", "runs"):
        assert f"  {name} " in done.out


def test_no_arguments_show_the_help(reft):
    done = reft()
    assert done.code == 2 and "Commands:" in done.out + done.err


def test_a_misspelt_command_is_a_usage_error(reft):
    done = reft("docter")
    assert done.code == 2 and done.out == ""
    assert "No such command 'docter'" in done.err and "doctor" in done.err


def test_usage_errors_as_json(reft):
    done = reft("doctor", "--json", "--bogus")
    assert done.code == 2 and done.error["code"] == 2 and done.error["kind"] == "usage"
    assert "--bogus" in done.error["message"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SpecError("x"), 2),
        (DataError("x"), 3),
        (ModelError("x"), 4),
        (CheckpointError("x"), 4),
        (MemoryExhausted("x"), 5),
        (Diverged("x"), 6),
        (BelowThreshold("x"), 7),
        (Interrupted("x", signal=signal.SIGINT), 130),
        (Interrupted("x", signal=signal.SIGTERM), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(reft, command, error, code):
    command(error)
    done = reft("boom")
    assert done.code == code and done.out == ""
    assert "Traceback" not in done.err


def test_every_problem_is_a_line_with_its_place(reft, command):
    problems = (
        Problem("unknown key; did you mean `train.epochs`?", "s.yaml", 11, 3, "train.epoch", "train.epochs"),
        Problem("format `alpaca` needs columns instruction, output", "d.jsonl", hint="Map them: columns: {a: b}"),
    )
    command(SpecError(*problems))
    assert reft("boom").err == (
        "s.yaml:11:3: train.epoch: unknown key; did you mean `train.epochs`?\n"
        "d.jsonl: format `alpaca` needs columns instruction, output\n"
        "  Map them: columns: {a: b}\n"
    )


def test_an_error_as_json(reft, command):
    command(SpecError(Problem("unknown key", "s.yaml", 7, 3, "intervention.position", "intervention.positions")))
    assert reft("boom", "--json").error == {
        "code": 2,
        "kind": "spec",
        "file": "s.yaml",
        "line": 7,
        "column": 3,
        "key": "intervention.position",
        "message": "unknown key",
        "hint": "intervention.positions",
    }


def test_several_problems_are_one_object(reft, command):
    command(SpecError(Problem("one", key="a"), Problem("two", key="b")))
    error = reft("boom", "--json").error
    assert error["message"] == "one"
    assert [problem["message"] for problem in error["problems"]] == ["one", "two"]


def test_a_bug_is_one_line_and_a_report(reft, command):
    command(ZeroDivisionError("oh\nno"))
    done = reft("boom")
    assert done.code == 1 and done.out == ""
    assert done.err.count("\n") == 1 and done.err.startswith("internal error: ZeroDivisionError: oh (traceback: ")
    assert "report it" in done.err
    report = Path(done.err.partition("traceback: ")[2].partition(")")[0])
    text = report.read_text()
    report.unlink()
    assert text.startswith("reft boom\n") and "ZeroDivisionError: oh" in text and "Traceback" in text


def test_the_report_of_a_bug_lies_in_the_run(reft, command, tmp_path, monkeypatch):
    command(ZeroDivisionError("oh"))
    monkeypatch.setattr(console, "reset", lambda words: setattr(console.settings, "run", tmp_path))
    monkeypatch.setattr(console.settings, "run", None)
    reft("boom")
    assert len(list((tmp_path / "logs").glob("reft-error-*.log"))) == 1


def test_a_bug_as_json(reft, command):
    command(ZeroDivisionError("oh"))
    error = reft("boom", "--json").error
    Path(error["traceback"]).unlink()
    assert (error["code"], error["kind"]) == (1, "bug")


def test_a_token_on_the_command_line_stays_out_of_the_report(reft, command):
    @app.command("secret")
    def secret(token: str) -> None:
        raise ZeroDivisionError

    done = reft("secret", "hf_" + "a" * 30)
    report = Path(done.err.partition("traceback: ")[2].partition(")")[0])
    assert "aaaa" not in report.read_text()
    report.unlink()


def test_a_full_disk_is_no_bug(reft, command):
    command(OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"))
    done = reft("boom")
    assert (done.code, done.err) == (1, "runs/x/metrics.jsonl: no space left on device\n")


@pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
def test_a_reader_that_leaves_early_is_no_error():
    words = [sys.executable, "-m", "reft_cli", "doctor", "--json"]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody:
        done = subprocess.run(words, stdout=nobody, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
def test_nobody_has_to_read_what_is_said():
    """`reft train … 2>&1 | tee log` ended in "broken pipe", code 1, when tee did; every error had that code too."""
    says = "from reft_cli.cli import console; console.say('a'); console.say('b'); print('done')"
    for words, code, out in ((["-c", says], 0, "done\n"), (["-m", "reft_cli", "runs", "show", "nowhere"], 4, "")):
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "w") as nobody:
            done = subprocess.run(
                [sys.executable, *words], stdout=subprocess.PIPE, stderr=nobody, text=True, check=False
            )
        assert (done.returncode, done.stdout) == (code, out)


def test_no_codes_for_colours_in_a_pipe_even_when_forced():
    forced = os.environ | {"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "GITHUB_ACTIONS": "true", "PY_COLORS": "1"}
    for words in (["--help"], ["trian"], ["runs", "ls", str(Path(__file__).parent)]):
        done = subprocess.run([sys.executable, "-m", "reft_cli", *words], capture_output=True, env=forced, check=False)
        assert done.stdout + done.stderr and b"\x1b" not in done.stdout + done.stderr, words


@pytest.mark.parametrize("place", ["before", "after"])
def test_global_flags_stand_before_or_after_the_command(reft, place, monkeypatch):
    seen = {}
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))

    @app.command("look")
    def look(
        verbose: options.Verbose = False,
        quiet: options.Quiet = False,
        no_progress: options.NoProgress = False,
    ) -> None:
        seen.update(vars(console.settings))

    flags = ["-v", "-q", "--no-progress"]
    assert reft(*(["look", *flags] if place == "after" else [*flags, "look"])).code == 0
    assert (seen["verbose"], seen["quiet"], seen["progress"]) == (True, True, False)
    reft("look")
    assert (seen["verbose"], seen["quiet"], seen["progress"]) == (False, False, True)


def test_the_libraries_are_quiet_unless_asked(reft, monkeypatch):
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))
    seen = []

    @app.command("look")
    def look() -> None:
        seen.append(os.environ.get("TRANSFORMERS_VERBOSITY"))

    reft("look")
    reft("-v", "look")
    assert seen == ["error", None]
