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
import torch
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
    assert "step 4 is reached already, 4 were asked for: nothing is left to train" in resumed[0][2]


FAULTS = [  # what happens in both processes, the code, and what the first one says
    (
        "training.loop.Trainer._report_step",
        ZeroDivisionError("planted"),
        1,
        "internal error: ZeroDivisionError: planted",
    ),
    ("tasks.objectives.CausalLM.loss", torch.OutOfMemoryError("CUDA out of memory. Tried"), 5, "Try, in order"),
    ("runfolder.RunFolder.append_metrics", OSError(28, "No space left on device"), 1, "no space left on device"),
]


def program_with_faults(rows: list[list[str]], ports: list[int], folder: Path) -> list[tuple[int, str, str]]:
    """Command lines in this process, to each of which one of FAULTS happens."""
    found = []
    for (target, error, *_), words, port in zip(FAULTS, rows, ports, strict=True):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"reft_cli.{target}", fail)
            found += program([words], [port], folder)
    return found


def test_what_can_happen_to_anybody_has_the_code_of_one_process(here: Path):
    rows = [["train", "s.yaml", "--name", f"t{number}", "-q"] for number in range(len(FAULTS))]
    ports = [free_port() for _ in rows]
    first, second = run_as(program_with_faults, rows, ports, here, MASTER_ADDR="127.0.0.1")
    for (_, _, code, said), one, other in zip(FAULTS, first, second, strict=True):
        assert (one[0], other[0], one[1]) == (code, code, "") and said in one[2] and "Traceback" not in one[2]
    assert [RunFolder(f"runs/t{number}").read()["exit_code"] for number in range(len(FAULTS))] == [1, 5, 1]


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


LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node 2",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no",
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(here: Path, launcher: str):
    words = ["-m", "reft_cli", "train", "s.yaml", "--name", "t", "--set", "model.device=cpu"]
    program = [sys.executable, "-m", *LAUNCHERS[launcher].split(), *words]
    assert subprocess.run(program, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120, check=False).returncode == 0
    assert RunFolder("runs/t").read()["processes"] == 2


TOOLS = {  # what the recipes call, on this machine alone
    "reft": f'exec {sys.executable} -m reft_cli "$@" --name t --set model.device=cpu',
    "ssh": 'shift; exec bash -c "$*"',
    "scontrol": "echo 127.0.0.1",
    "srun": "\n".join(
        [
            "export SLURM_NTASKS=2",
            'SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & other=$!',
            'SLURM_PROCID=0 SLURM_LOCALID=0 "$@"; code=$?',
            "wait $other || exit 1; exit $code",
        ]
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["On Slurm:", "With ssh and two machines"])
def test_the_recipes_for_two_machines(here: Path, recipe: str):
    """The README's own lines, with stand-ins for the tools of a cluster: two groups of processes on this machine."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    block = readme[readme.index(recipe) :].split("```sh\n", 1)[1].split("```", 1)[0]
    for written, here_it_is in (("29400", str(free_port())), ("MASTER_ADDR=a", "MASTER_ADDR=127.0.0.1")):
        block = block.replace(written, here_it_is)
    block = block.replace("spec.yaml --resume", "spec.yaml").replace("spec.yaml", "s.yaml")
    folder = here / "tools"
    folder.mkdir()
    for name, body in TOOLS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    given = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "SLURM_JOB_NODELIST": "x"}
    block += "\nwait"  # for the other machine
    done = subprocess.run(["bash", "-ec", block], env=os.environ | given, timeout=120, text=True, capture_output=True)
    assert done.returncode == 0 and RunFolder("runs/t").read()["processes"] == 2, done.stderr
    assert RunFolder("runs/t").read()["status"] == "done"
