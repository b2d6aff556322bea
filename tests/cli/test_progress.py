"""Progress: the plain lines, the live display, and the numbers in them."""

import sys
from pathlib import Path

import pytest
from stand_ins import Terminal

from reft_cli.cli import console
from reft_cli.cli.progress import LiveProgress, PlainProgress, duration, gibibytes, progress, step_line, thousands
from reft_cli.training.observer import EvaluationRecord, NullObserver, Observer, StepRecord

STEP = StepRecord(
    step=40,
    steps=1200,
    epoch=0.1,
    loss=1.3123,
    learning_rate=9e-4,
    grad_norm=0.5,
    tokens=10_000,
    seconds=2.0,
    tokens_per_second=12_412.0,
    eta_seconds=362.0,
)
VALIDATION = EvaluationRecord(step=40, split="validation", metrics={"exact_match": 0.9125}, seconds=2.2, best=True)


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    for name, value in vars(console.Settings()).items():
        monkeypatch.setattr(console.settings, name, value)


@pytest.fixture
def make_terminal(monkeypatch):
    """Makes stderr a terminal once the test runs; before, pytest would put its own stderr there."""

    def make() -> Terminal:
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "100")
        for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        return sys.stderr

    return make


def play(observer: Observer) -> None:
    observer.on_start(1200, 0, {"run": "runs/x"})
    observer.on_step(STEP)
    observer.on_evaluation(VALIDATION)
    observer.on_checkpoint(40, Path("runs/x/checkpoints/step_000040"))
    observer.on_message("warning", "3 rows are long")
    observer.on_end("finished")


def test_the_line_of_a_step():
    assert step_line(STEP) == "step 40/1200 loss 1.312 lr 9.0e-04 12.4k tok/s eta 6m"


def test_plain_lines(capsys):
    with progress() as observer:
        assert type(observer) is PlainProgress
        play(observer)
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.splitlines() == [
        "training: 1,200 steps, run runs/x",
        "step 40/1200 loss 1.312 lr 9.0e-04 12.4k tok/s eta 6m",
        "validation at step 40: exact_match 0.9125 (best) in 2s",
        "warning: 3 rows are long",
    ]
    assert console.settings.run == Path("runs/x")


def test_quiet_leaves_only_warnings(capsys):
    console.settings.quiet = True
    with progress() as observer:
        play(observer)
    assert capsys.readouterr().err == "warning: 3 rows are long\n"


def test_verbose_names_the_checkpoints(capsys):
    console.settings.verbose = True
    with progress() as observer:
        play(observer)
    assert "checkpoint runs/x/checkpoints/step_000040\n" in capsys.readouterr().err


def test_slow_work_is_reported_now_and_then(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    observer = PlainProgress()
    observer.on_start(400, 0, {"verb": "evaluating", "unit": "row"})
    for now, done in ((5.0, 10), (11.0, 20), (12.0, 30), (22.0, 40)):  # noqa: B007  the clock reads it
        observer.on_progress(done, 400)
    assert capsys.readouterr().err == "evaluating: 400 rows\nrow 20/400 eta 3m\nrow 40/400 eta 3m\n"


def test_a_bar_for_rows(make_terminal):
    terminal = make_terminal()
    with progress() as observer:
        observer.on_start(400, 0, {"verb": "evaluating", "unit": "row"})
        observer.on_progress(30, 400)
        observer._live.refresh()
    assert "30/400" in terminal.getvalue()


def test_a_terminal_gets_a_live_display(make_terminal, capsys):
    terminal = make_terminal()
    with progress() as observer:
        assert isinstance(observer, LiveProgress)
        play(observer)
        observer._live.refresh()
    shown = terminal.getvalue()
    for piece in (
        "40/1200",
        "loss 1.312",
        "lr 9.0e-04",
        "12.4k tok/s",
        "eta 6m",
        "exact_match 0.9125",
        "3 rows are long",
    ):
        assert piece in shown, piece
    assert "\x1b[" in shown
    assert capsys.readouterr().out == ""


def test_a_live_display_ends_with_an_error(make_terminal):
    terminal = make_terminal()
    stderr = sys.stderr
    with pytest.raises(ZeroDivisionError), progress() as observer:
        observer.on_start(10, 0, {})
        raise ZeroDivisionError
    assert sys.stderr is stderr
    assert terminal.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in terminal.getvalue()  # the cursor is back


def test_stdout_stays_stdout_under_a_live_display(make_terminal, capsys):
    terminal = make_terminal()
    with progress():
        print("result")
    assert capsys.readouterr().out == "result\n" and "result" not in terminal.getvalue()


@pytest.mark.parametrize("reason", ["dumb", "no-progress", "quiet"])
def test_no_live_display_when_not_wanted(make_terminal, monkeypatch, reason):
    terminal = make_terminal()
    if reason == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    setattr(
        console.settings,
        *{"no-progress": ("progress", False), "quiet": ("quiet", True), "dumb": ("json", False)}[reason],
    )
    with progress() as observer:
        assert type(observer) is PlainProgress
        play(observer)
    assert "\x1b" not in terminal.getvalue()


def test_no_colour_is_honoured(make_terminal, monkeypatch):
    terminal = make_terminal()
    monkeypatch.setenv("NO_COLOR", "1")
    with progress() as observer:
        play(observer)
        observer._live.refresh()
    assert "\x1b[3" not in terminal.getvalue()  # foreground colours


def test_a_null_observer_says_nothing(capsys):
    play(NullObserver())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59.4, "59s"), (59.6, "1m"), (362, "6m"), (3585, "1h00m"), (3900, "1h05m")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_numbers():
    assert [thousands(number) for number in (7, 834.4, 12_412, 3_100_000)] == ["7", "834", "12.4k", "3.1M"]
    assert [gibibytes(size) for size in (5 * 2**20, 7.9 * 2**30)] == ["5 MiB", "7.9 GiB"]
