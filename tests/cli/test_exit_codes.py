"""The table of exit codes, produced by the real program: a code, one JSON object on stderr, nothing on stdout.

Signals and a planted bug reach a process of their own; test_commands.py has the same codes with errors as text.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exit_code_table import REFUSED
from reft_cli.runfolder import RunFolder

MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 4 GiB")
LOST = RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronous")
FULL = OSError(errno.ENOSPC, "No space left on device")
ONWARD = " left on device. Put that right and go on with --resume."


def words_of(error: dict[str, object]) -> str:
    """Everything that a JSON error says."""
    return " ".join(map(str, error.values()))


def damage_weights() -> None:
    file = Path("runs/s/best/interventions.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def damage_manifest() -> None:
    Path("runs/s/best/reft.json").write_text("[" * 10_000)


def rewrite_data() -> None:
    with Path("rows.jsonl").open("a") as file:
        file.write('{"prompt": "new", "completion": "row"}\n')


@pytest.mark.parametrize(("words", "code", "kind", "said"), REFUSED)
def test_what_is_asked_for_cannot_be(reft, here: Path, words: str, code: int, kind: str, said: str):
    done = reft(*words.split(), "--json", "-q")
    assert (done.code, done.error["code"], done.error["kind"]) == (code, code, kind)
    assert said in words_of(done.error)
    assert code == 7 or done.out == ""
    assert RunFolder("runs/s").read()["status"] == "done" and not Path("runs/t").exists()


@pytest.mark.parametrize(
    ("change", "words", "code", "kind", "said"),
    [
        (damage_weights, "eval runs/s", 4, "checkpoint", "interventions.safetensors: damaged"),
        (damage_manifest, "infer runs/s --prompt a", 4, "checkpoint", "reft.json: damaged: not JSON"),
        (damage_weights, "train s.yaml --resume 2", 4, "checkpoint", "interventions.safetensors: damaged"),
        (rewrite_data, "train s.yaml --resume", 3, "data", "its rows have changed since runs/s was begun"),
        (lambda: shutil.rmtree("runs/s/checkpoints"), "eval runs/s", 4, "checkpoint", "has no checkpoint"),
        (lambda: Path("runs/s/run.json").write_text("{"), "eval runs/s", 4, "checkpoint", "neither a run"),
        (lambda: Path("runs/s/run.json").write_text("{"), "train s.yaml", 2, "spec", "is not a run"),
    ],
)
def test_what_is_there_has_been_changed(
    reft, here: Path, change: Callable[[], object], words: str, code: int, kind: str, said: str
):
    assert Path("runs/s/best").resolve().name == "step_000002"
    change()
    done = reft(*words.split(), "--json", "-q")
    assert (done.code, done.error["kind"], done.out) == (code, kind, "")
    assert said in words_of(done.error)


@pytest.mark.parametrize(
    ("target", "error", "words", "code", "kind", "said"),
    [
        ("tasks.objectives.CausalLM.loss", MEMORY, "train s.yaml --name t", 5, "memory", "Try, in order"),
        (
            "tasks.objectives.CausalLM.loss",
            LOST,
            "train s.yaml --name t",
            1,
            "error",
            "the GPU failed: CUDA error: uncorrectable",
        ),
        ("tasks.objectives.CausalLM.loss", MEMORY, "eval runs/s --loss", 5, "memory", "CUDA out of memory"),
        ("generation.decode.Endings.of", MEMORY, "infer runs/s --prompt a", 5, "memory", "CUDA out of memory"),
        ("models.loading.load_config", MEMORY, "eval runs/s", 5, "memory", "CUDA out of memory"),
        ("runfolder.RunFolder.append_metrics", FULL, "train s.yaml --name t", 1, "error", f"runs/t: no space{ONWARD}"),
        ("runfolder.RunFolder.begin", FULL, "train s.yaml --name t", 1, "error", "no space left on device"),
        ("runfolder.RunFolder.evaluation", FULL, "eval runs/s", 1, "error", "no space left on device"),
        ("generation.decode.Endings.of", ZeroDivisionError("oh"), "eval runs/s", 1, "bug", "ZeroDivisionError: oh"),
    ],
)
def test_what_can_happen_to_anybody(
    reft,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    error: Exception,
    words: str,
    code: int,
    kind: str,
    said: str,
):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"reft_cli.{target}", fail)
    done = reft(*words.split(), "--json", "-q")
    assert (done.code, done.error["code"], done.error["kind"], done.out) == (code, code, kind, "")
    assert said in words_of(done.error)
    if kind == "bug":
        Path(done.error["traceback"]).unlink()
    if words.startswith("train") and RunFolder("runs/t").exists():
        assert RunFolder("runs/t").read()["exit_code"] == code


def test_divergence(reft, here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("reft_cli.training.loop.rate_factor", lambda step, **_: 1e38 if step == 2 else 1.0)
    done = reft("train", "s.yaml", "--name", "t", "--json", "-q")
    assert (done.code, done.error["kind"], done.out) == (6, "diverged", "")
    assert "at step 4 (rows " in done.error["message"]
    assert "Last good checkpoint: checkpoints/step_000002." in done.error["message"]


def test_a_score_that_is_good_enough(reft, here: Path):
    assert reft("eval", "runs/s", "--fail-under", "exact_match=0", "-q").code == 0


def test_a_chat_outlives_what_cannot_be_answered(reft, here: Path, monkeypatch: pytest.MonkeyPatch):
    lines = ["/set min_new_tokens 9", "a", "/set min_new_tokens 3", "a", "/set temperature 1e-9", "/quit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    done = reft("infer", "runs/s", "--chat")
    assert done.code == 0 and done.out.strip()
    assert "generation.min_new_tokens: min_new_tokens 9 is more than max_new_tokens 3" in done.err
    assert "1e-09 is too near to 0" in done.err


# ---- processes


def start(*words: str, **given: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FORCE_COLOR": "1", "CLICOLOR_FORCE": "1"}
    command = [sys.executable, "-m", "reft_cli", *words]
    return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, **given)


def read_until(process: subprocess.Popen, piece: str) -> str:
    """Its stderr up to the first line with `piece`."""
    seen = ""
    for line in process.stderr:
        seen += line
        if piece in line:
            return seen
    raise AssertionError(f"ended without {piece!r}:\n{seen}")


LONG = ("--set", "train.epochs=2000", "--set", "checkpoint.every=500", "--set", "evaluation.every=never")


def test_ctrl_c_saves_says_how_to_go_on_and_keeps_stdout_clean(here: Path):
    """`reft train … > out`, interrupted, gone on with by the command it names, cut short here: one line in `out`."""
    with Path("out").open("w") as out:
        process = start("train", "s.yaml", "--name", "t", *LONG, stdout=out)
        seen = read_until(process, "step 5/")
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and Path("out").read_text() == ""
    assert "\x1b" not in seen + rest and "Traceback" not in rest
    command = f"reft train s.yaml {' '.join(LONG)} --name t --resume"
    assert re.fullmatch(r"stopped by SIGINT at step \d+", rest.splitlines()[-2])
    assert rest.splitlines()[-1] == f"  Go on with: {command}"
    run = RunFolder("runs/t")
    step = run.read()["reason"].split()[-1]
    assert run.read()["status"] == "interrupted" and run.linked("last") == run.checkpoint(int(step))
    with Path("out").open("w") as out:
        words = [*command.split()[1:], "--set", f"train.max_steps={int(step) + 3}"]
        process = start(*words, stdout=out)
        rest = process.communicate(timeout=60)[1]
    assert process.returncode == 0, rest
    assert Path("out").read_text() == "runs/t\n"
    assert "\x1b" not in rest and f"going on from step {step} of {int(step) + 3}" in rest


def test_sigterm_as_schedulers_send_it(here: Path):
    process = start("train", "s.yaml", "--name", "t", *LONG, "--json", stdout=subprocess.PIPE)
    read_until(process, "step 5/")
    process.terminate()
    out, rest = process.communicate(timeout=60)
    error = json.loads(rest.splitlines()[-1])["error"]
    assert (process.returncode, error["code"], error["kind"], out) == (143, 143, "interrupted", "")
    assert error["hint"].startswith("Go on with: reft train s.yaml ") and error["hint"].endswith(" --resume")
    run = RunFolder("runs/t")
    assert (run.read()["status"], run.read()["exit_code"]) == ("interrupted", 143) and run.linked("last")


def test_a_planted_bug_is_a_line_and_a_report_in_the_run(here: Path):
    program = (
        "import reft_cli.training.loop as loop\n"
        "def broken(self, norm, rate): raise ZeroDivisionError('planted')\n"
        "loop.Trainer._report_step = broken\n"
        "from reft_cli.cli.app import main; main(['train', 's.yaml', '--name', 't'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    (report,) = Path("runs/t/logs").glob("reft-error-*.log")
    line = done.stderr.splitlines()[-1]
    assert line.startswith(
        f"internal error: ZeroDivisionError: planted (traceback: {report.resolve()}). This is a bug in reft"
    )
    assert "ZeroDivisionError: planted" in report.read_text() and "Traceback" in report.read_text()
    assert RunFolder("runs/t").read()["exit_code"] == 1


def test_json_is_json_to_others(reft, here: Path):
    """`reft eval RUN --json | python -m json.tool`."""
    for words in ("eval runs/s -q", "eval runs/s -q --compare-base", "infer runs/s --prompt a", "runs show runs/s"):
        done = reft(*words.split(), "--json")
        assert (done.code, done.err, done.out.count("\n")) == (0, "", 1)
        tool = subprocess.run([sys.executable, "-m", "json.tool"], input=done.out, capture_output=True, text=True)
        assert tool.returncode == 0 and json.loads(tool.stdout) == done.json
