"""The parent: one exit code and one line whatever ends its processes, which never outlive it. They are stubs here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from reft_cli.errors import SpecError
from reft_cli.parallel import launch
from reft_cli.parallel.launch import LOST, Outcome

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and sessions are POSIX's")


def stub(text: str) -> list[str]:
    """A program that knows its rank."""
    head = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
    return [sys.executable, "-S", "-c", head + textwrap.dedent(text)]


@pytest.mark.parametrize(
    ("text", "count", "outcome"),
    [
        ("", 3, Outcome(0)),
        ("sys.exit(7)", 2, Outcome(7)),
        ("sys.exit(7 if rank == 0 else 75)", 2, Outcome(7)),
        ("print('a\\nb: no', file=sys.stderr); sys.exit(3 if rank == 1 else 75)", 2, Outcome(3, said="b: no")),
        ("time.sleep(0.3 * rank); sys.exit(4 + rank)", 2, Outcome(4)),
        ("sys.exit(75)", 2, Outcome(1, lost="the processes of this run lost each other")),
        ("sys.exit(rank)", 2, Outcome(1, said="process 1 of 2 failed and said nothing")),
        ("os.kill(os.getpid(), 11 if rank else 0)", 2, Outcome(139, lost="process 1 of 2 was ended by SIGSEGV")),
    ],
)  # fmt: skip
def test_the_first_cause_is_what_is_reported(text: str, count: int, outcome: Outcome):
    assert LOST == 75
    assert launch.run_command(stub(text), count) == outcome


def test_the_others_are_ended_when_one_was_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "STRANDED", 0.2)
    started = time.monotonic()
    outcome = launch.run_command(stub("time.sleep(60) if rank else os.kill(os.getpid(), 9)"), 2)
    assert time.monotonic() - started < 10
    said = "process 0 of 2 was ended by SIGKILL; is there too little memory in the machine?"
    assert outcome == Outcome(137, lost=said)


def test_the_others_get_time_when_one_ends_with_a_code(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "STRANDED", 0.0)
    assert launch.run_command(stub("time.sleep(0.5 * (1 - rank)); sys.exit(6)"), 2) == Outcome(6)
    monkeypatch.setattr(launch, "AGREED", 0.2)
    assert launch.run_command(stub("time.sleep(60 * (1 - rank)); sys.exit(6)"), 2).code == 6


PARENT = """
import sys
from reft_cli.parallel import launch
launch.STRANDED = 0.5
print("up", flush=True)
outcome = launch.run_command([sys.executable, "-S", "-c", sys.argv[1]], 2)
print(outcome.code)
"""
CHILD = """
import os, signal, sys, time
here = os.path.join({folder!r}, os.environ["RANK"])
def note(number, _):
    with open(here, "a") as file: file.write(f"{{number}} ")
    if number != signal.SIGUSR1 and {ends}: sys.exit(128 + number)
for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1): signal.signal(each, note)
open(here, "w").close()
{wait}
"""
SLEEP = "while True: time.sleep(0.01)"


def parent(folder: Path, *, ends: bool = True, wait: str = SLEEP) -> subprocess.Popen[str]:
    """A parent whose two processes are ready."""
    child = CHILD.format(folder=str(folder), ends=ends, wait=wait)
    process = subprocess.Popen([sys.executable, "-c", PARENT, child], stdout=subprocess.PIPE, text=True)
    until(lambda: (folder / "0").exists() and (folder / "1").exists())
    return process


def until(true) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def heard(folder: Path) -> list[str]:
    return [(folder / rank).read_text() for rank in "01"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once_and_is_the_exit_code(tmp_path: Path, number: signal.Signals):
    process = parent(tmp_path)
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == f"up\n{128 + number}\n"
    assert heard(tmp_path) == [f"{int(number)} "] * 2


def test_sigusr1_is_passed_on_and_a_second_stop_ends_all_at_once(tmp_path: Path):
    process = parent(tmp_path, ends=False)
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
        before = heard(tmp_path)[0]
        process.send_signal(number)
        until(lambda before=before: all(len(each) > len(before) for each in heard(tmp_path)))
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "up\n143\n"
    assert heard(tmp_path) == ["10 10 15 "] * 2


def test_processes_do_not_outlive_their_parent(tmp_path: Path):
    wait = f"from reft_cli.parallel import launch; launch.end_with_parent(); {SLEEP}".replace("; while", "\nwhile")
    process = parent(tmp_path, wait=wait)
    process.kill()
    process.communicate(timeout=30)
    until(lambda: heard(tmp_path) == ["15 ", "15 "])


@pytest.mark.parametrize(
    ("wanted", "device", "gpus", "count"),
    [
        ("auto", "auto", 0, 1),
        ("auto", "auto", 4, 4),
        ("auto", "cuda", 2, 2),
        ("auto", "cuda:1", 2, 1),
        ("auto", "cpu", 2, 1),
        (1, "auto", 4, 1),
        (3, "auto", 4, 3),
        (3, "cpu", 0, 3),
        (3, "auto", 0, 3),
    ],
)
def test_how_many(monkeypatch: pytest.MonkeyPatch, wanted: int | str, device: str, gpus: int, count: int):
    monkeypatch.setattr(launch, "_gpus", lambda: gpus)
    assert launch.count(wanted, device=device) == count


@pytest.mark.parametrize(
    ("wanted", "device", "said"),
    [
        (3, "auto", "parallel.processes: 3 are asked for, and this machine has 2 CUDA devices"),
        (2, "mps", "parallel.processes: 2 are asked for, and this machine has one device"),
        (2, "cuda:0", "parallel.processes: 2 processes need a device each; write model.device: cuda or auto"),
    ],
)
def test_too_many(monkeypatch: pytest.MonkeyPatch, wanted: int, device: str, said: str):
    monkeypatch.setattr(launch, "_gpus", lambda: 2)
    with pytest.raises(SpecError) as caught:
        launch.count(wanted, device=device)
    assert str(caught.value) == said
