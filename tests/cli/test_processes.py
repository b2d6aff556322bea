"""The program as two processes: the exit codes and the words of one, whoever started them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers

from exit_code_table import REFUSED
from processes import free_port, run_as
from reft_cli.cli.app import main
from reft_cli.runfolder import RunFolder

LONG = ("--set", "train.epochs=2000", "--set", "checkpoint.every=500", "--set", "evaluation.every=never")


def program(rows: list[list[str]], ports: list[int], folder: Path) -> list[tuple[int, str, str]]:
    """Command lines in this process, one after another: (exit code, stdout, stderr)."""
    transformers.utils.logging._tqdm_active = True  # as it is if it was imported before
    os.chdir(folder)
    found = []
    for words, port in zip(rows, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit) as _:
            try:
                main(words)
            except SystemExit as end:
                found.append((int(end.code or 0), out.getvalue(), err.getvalue()))
    return found


def both(rows: list[list[str]], folder: Path) -> list[list[tuple[int, str, str]]]:
    """What each row came to in the first and in the second process."""
    first, second = run_as(program, rows, [free_port() for _ in rows], folder, MASTER_ADDR="127.0.0.1")
    return list(zip(first, second, strict=True))


def test_every_refusal_is_said_once_and_has_one_code(here: Path):
    rows = [[*words.split(), "--json", "-q"] for words, *_ in REFUSED]
    for (words, code, kind, said), (first, second) in zip(REFUSED, both(rows, here), strict=True):
        assert (first[0], second[0]) == (code, code), words
        error = json.loads(first[2])["error"]
        assert error["kind"] == kind and said in " ".join(map(str, error.values())), words
        assert second[1:] == ("", "") or kind == "usage", words
    assert RunFolder("runs/s").read()["status"] == "done" and not Path("runs/t").exists()


def test_what_works_is_said_once(here: Path):
    rows = [
        ["train", "s.yaml", "--name", "t"],
        ["eval", "runs/s", "--json"],
        ["train", "s.yaml", "--name", "u", "--set", "train.learning_rate=1.0e+38"],
        ["train", "s.yaml", "--name", "t", "--resume", "--processes", "2"],
    ]
    (trained, scored, diverged, resumed) = both(rows, here)
    assert [first[0] for first, _ in (trained, scored, diverged, resumed)] == [0, 0, 6, 0]
    assert [second for _, second in (trained, scored, diverged, resumed)] == [(code, "", "") for code in (0, 0, 6, 0)]
    assert trained[0][1] == "runs/t\n" and "step 1/4" in trained[0][2]
    assert json.loads(scored[0][1])["rows"] == 8
    assert diverged[0][2].splitlines()[-1].startswith("loss ")
    assert "going on from step 4 of 4" in resumed[0][2]


# ---- `reft train --processes 2`, as a user starts it


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "reft_cli", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def read_until(process: subprocess.Popen[str], piece: str) -> str:
    seen = ""
    for line in process.stderr:
        seen += line
        if piece in line:
            return seen
    raise AssertionError(f"ended without {piece!r}:\n{seen}")


def children(of: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{of}/task/{of}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_process_that_is_killed_ends_all_with_its_code(here: Path):
    process = start("train", "s.yaml", "--name", "t", *LONG, "--processes", "2", "--set", "model.device=cpu")
    read_until(process, "step 5/")
    process.send_signal(signal.SIGUSR1)
    run = RunFolder("runs/t")
    deadline = time.monotonic() + 30
    while not run.checkpoints() and time.monotonic() < deadline:
        time.sleep(0.02)
    first, second = children(process.pid)
    os.kill(second, signal.SIGKILL)
    out, rest = process.communicate(timeout=60)
    said = "process 1 of 2 was ended by SIGKILL; is there too little memory in the machine?"
    assert (process.returncode, out, rest.splitlines()[-1]) == (137, "", said)
    assert "Traceback" not in rest and not Path(f"/proc/{first}").exists()
    record = run.read()
    assert (record["status"], record["exit_code"], record["reason"]) == ("failed", 137, said)
    assert run.checkpoints() and not run.is_written()


@pytest.mark.slow
def test_an_evaluation_on_two_processes(here: Path):
    alone, shared = (start("eval", "runs/s", "--device", "cpu", "--json", *more) for more in ((), ("--processes", "2")))
    first, second = (json.loads(process.communicate(timeout=120)[0]) for process in (alone, shared))
    assert alone.returncode == shared.returncode == 0
    assert first["metrics"] == pytest.approx(second["metrics"], rel=1e-5)
    below = start("eval", "runs/s", "--device", "cpu", "--fail-under", "exact_match=1.1", "--processes", "2")
    assert "exact_match is 0.0000, below 1.1" in below.communicate(timeout=120)[1] and below.returncode == 7


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_says_how_to_go_on_and_keeps_stdout_clean(here: Path, number: signal.Signals):
    process = start("train", "s.yaml", "--name", "t", *LONG, "--processes", "2", "--set", "model.device=cpu")
    read_until(process, "step 5/")
    process.send_signal(number)
    out, rest = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, "") and "Traceback" not in rest
    assert re.fullmatch(rf"stopped by {number.name} at step \d+", rest.splitlines()[-2])
    assert rest.splitlines()[-1].startswith("  Go on with: reft train s.yaml ")
    record = RunFolder("runs/t").read()
    assert (record["status"], record["exit_code"]) == ("interrupted", 128 + number)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "nodes"])
def test_other_launchers(here: Path, launcher: str):
    """torchrun on one machine; and two processes that were told of each other by hand, as on two machines."""
    words = ["-m", "reft_cli", "train", "s.yaml", "--name", "t", "--set", "model.device=cpu"]
    if launcher == "torchrun":
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
        processes = [subprocess.Popen(program, env=os.environ | {"OMP_NUM_THREADS": "1"})]
    else:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        processes = [
            subprocess.Popen([sys.executable, *words], env=os.environ | meeting | {"RANK": str(rank)})
            for rank in range(2)
        ]
    assert [process.wait(120) for process in processes] == [0] * len(processes)
    assert RunFolder("runs/t").read()["processes"] == 2
