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

from reft_cli.cli.app import main
from reft_cli.runfolder import RunFolder

SPEC = """\
model: {model}
intervention: {{positions: f2+l2, rank: 2}}
data: {{train: rows.jsonl, validation: rows.jsonl, test: rows.jsonl}}
train: {{epochs: 2, global_batch_size: 4, learning_rate: 1.0e-2, log_every: 1}}
generation: {{max_new_tokens: 3}}
checkpoint: {{every: 1, keep: 9}}
"""
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 4 GiB")
FULL = OSError(errno.ENOSPC, "No space left on device")
ONWARD = " left on device. Put that right and go on with --resume."


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with s.yaml, rows.jsonl and a finished run in runs/s."""
    folder, before = tmp_path_factory.mktemp("project"), Path.cwd()
    rows = [{"prompt": f"{word}? ", "completion": word} for word in ("aa", "bb", "cc", "dd") * 2]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "x" * 600, "completion": "y"}) + "\n")
    (folder / "s.yaml").write_text(SPEC.format(model=tiny_llama))
    os.chdir(folder)
    with pytest.raises(SystemExit) as end:
        main(["train", "s.yaml", "-q"])
    os.chdir(before)
    assert not end.value.code
    return folder


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, which is the working directory."""
    shutil.copytree(project, tmp_path / "p", symlinks=True)
    monkeypatch.chdir(tmp_path / "p")
    return tmp_path / "p"


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


@pytest.mark.parametrize(
    ("words", "code", "kind", "said"),
    [
        ("train", 2, "usage", "Missing argument"),
        ("train s.yaml --nope", 2, "usage", "--nope"),
        ("train s.yaml", 2, "spec", "runs/s exists and has finished. Continue with --resume"),
        ("train nowhere.yaml", 2, "spec", "nowhere.yaml"),
        ("train s.yaml --name t --set train.epoch=1", 2, "spec", "did you mean `train.epochs`?"),
        ("train s.yaml --resume --set train.seed=1", 2, "spec", "was begun with other settings"),
        ("train s.yaml --name t --resume", 2, "spec", "nothing to resume"),
        ("eval runs/s --split tets", 2, "spec", "--split tets: the run's spec has train, validation and test"),
        ("infer runs/s --prompt a --top-p 2", 2, "usage", "--top-p"),
        ("infer runs/s --prompt a --seed 18446744073709551616", 2, "spec", "--seed"),
        ("train s.yaml --name t --set data.train=nowhere.jsonl", 3, "data", "nowhere.jsonl"),
        ("train s.yaml --name t --set data.train=empty.jsonl", 3, "data", "no token to learn from"),
        ("train s.yaml --name t --set data.train=long.jsonl", 3, "data", "longer than data.max_length 512"),
        ("train s.yaml --name t --set data.format=alpaca", 3, "data", "format `alpaca` needs columns"),
        ("eval runs/s --data nowhere.csv", 3, "data", "nowhere.csv"),
        ("infer runs/s --input s.yaml", 3, "data", "s.yaml"),
        ("infer runs/s --field question=a", 3, "data", "no column `prompt`"),
        ("train s.yaml --name t --set model.name=./nowhere", 4, "model", "./nowhere: no such folder"),
        ("train s.yaml --name t --set model.name=rows.jsonl", 4, "model", "this is a file"),
        ("train s.yaml --name t --set intervention.layers=[16]", 4, "model", "layer 16 does not exist"),
        ("train s.yaml --name t --set model.device=cuda:99", 4, "model", "cuda:99 does not exist"),
        ("eval runs/s --device gpu", 4, "model", "`gpu` is not auto, cpu, mps, cuda or cuda:N"),
        ("eval runs/ss", 4, "checkpoint", "runs/ss does not exist; did you mean runs/s?"),
        ("eval runs/s --checkpoint 77", 4, "checkpoint", "no checkpoint `77`; there are last and the steps"),
        ("train s.yaml --resume 77", 4, "checkpoint", "no checkpoint `77`"),
        ("eval runs/s --fail-under exact_match=1.1", 7, "threshold", "exact_match is 0.0000, below 1.1"),
    ],
)
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
        ("tasks.objectives.CausalLM.loss", MEMORY, "eval runs/s", 5, "memory", "CUDA out of memory"),
        ("generation.decode.Endings.of", MEMORY, "infer runs/s --prompt a", 5, "memory", "CUDA out of memory"),
        ("models.loading.load_config", MEMORY, "eval runs/s", 5, "memory", "CUDA out of memory"),
        ("runfolder.RunFolder.append_metrics", FULL, "train s.yaml --name t", 1, "error", f"runs/t: no space{ONWARD}"),
        ("runfolder.RunFolder.begin", FULL, "train s.yaml --name t", 1, "error", "no space left on device"),
        ("runfolder.RunFolder.evaluation", FULL, "eval runs/s", 1, "error", "no space left on device"),
        ("tasks.objectives.CausalLM.loss", ZeroDivisionError("oh"), "eval runs/s", 1, "bug", "ZeroDivisionError: oh"),
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


def test_divergence(reft, here: Path):
    done = reft("train", "s.yaml", "--name", "t", "--set", "train.learning_rate=1.0e+38", "--json", "-q")
    assert (done.code, done.error["kind"], done.out) == (6, "diverged", "")
    assert "Last good checkpoint: checkpoints/step_00000" in done.error["message"]


def test_a_score_that_is_good_enough(reft, here: Path):
    assert reft("eval", "runs/s", "--fail-under", "exact_match=0", "-q").code == 0


def test_a_chat_outlives_what_cannot_be_answered(reft, here: Path, monkeypatch: pytest.MonkeyPatch):
    lines = ["/set min_new_tokens 9", "a", "/set min_new_tokens 3", "a", "/set temperature 1e-9", "/quit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    done = reft("infer", "runs/s", "--chat")
    assert done.code == 0 and done.out.strip()
    assert "--min-new-tokens: min_new_tokens 9 is more than max_new_tokens 3" in done.err
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
