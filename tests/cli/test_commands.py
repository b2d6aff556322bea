"""The commands on a tiny random model, nothing replaced: the way through, and an exit code for each kind of end."""

import json
import os
import signal
from pathlib import Path

import pytest

from reft_cli.cli import progress
from reft_cli.cli.app import main
from reft_cli.runfolder import RunFolder
from reft_cli.training.observer import StepRecord

SPEC = """\
model: {model}
intervention: {{positions: f2+l2, rank: 2}}
data: {{train: train.jsonl, validation: train.jsonl, test: train.jsonl}}
train: {{epochs: 2, global_batch_size: 4, learning_rate: 1.0e-2, log_every: 1}}
generation: {{max_new_tokens: 4}}
checkpoint: {{keep: 5}}
"""


def write_project(folder: Path, model: Path) -> None:
    rows = [{"prompt": f"{word}? ", "completion": word} for word in ("aa", "bb", "cc", "dd") * 3]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "s.yaml").write_text(SPEC.format(model=model))


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_llama):
    """A folder with a spec, and a run of it in runs/s: six steps, two epochs."""
    folder, before = tmp_path_factory.mktemp("project"), Path.cwd()
    write_project(folder, tiny_llama)
    os.chdir(folder)
    with pytest.raises(SystemExit) as end:
        main(["train", "s.yaml", "-q"])
    os.chdir(before)
    assert not end.value.code
    return folder


@pytest.fixture
def run(project, monkeypatch):
    monkeypatch.chdir(project)
    return "runs/s"


@pytest.fixture
def spec(tmp_path, monkeypatch, tiny_llama):
    """A spec of one's own, without a run."""
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, tiny_llama)
    return "s.yaml"


def test_training_prints_lines_on_stderr_and_the_run_on_stdout(reft, spec):
    done = reft("train", spec)
    assert (done.code, done.out) == (0, "runs/s\n")
    assert "step 6/6 loss" in done.err and "validation at step 6: " in done.err
    assert "\x1b" not in done.out + done.err
    assert RunFolder("runs/s").read()["status"] == "done"


def test_the_folder_is_complete(run):
    folder = RunFolder(run)
    assert folder.read()["status"] == "done" and folder.card.is_file()
    assert [line["step"] for line in folder.read_metrics() if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert folder.linked("last") == folder.checkpoint(6) and folder.linked("best") is not None
    assert folder.scores() is not None


def test_evaluation(reft, run):
    done = reft("eval", run, "--compare-base", "--limit", 4, "--json")
    assert done.code == 0 and set(done.json["metrics"]) == set(done.json["base_metrics"]) == {"exact_match"}
    assert done.json["rows"] == 4 and Path(done.json["path"]).is_file()


def test_a_score_below_the_gate_is_code_7(reft, run):
    done = reft("eval", run, "--limit", 4, "--fail-under", "exact_match=1.1")
    assert done.code == 7 and "exact_match is" in done.err


def test_answers(reft, run):
    first = reft("infer", run, "--prompt", "aa", "--seed", 1, "--temperature", 1)
    assert first.code == 0 and first.err == "" and first.out.endswith("\n")
    assert reft("infer", f"{run}/best", "--prompt", "aa", "--json").json["tokens"] <= 4
    streamed = reft("infer", run, "--prompt", "aa", "--stream", "--seed", 1, "--temperature", 1)
    assert streamed.out == first.out
    assert reft("infer", run, "--prompt", "aa", "--raw", "--base").code == 0


def test_answers_to_rows(reft, run):
    lines = [json.loads(line) for line in reft("infer", run, "--input", "train.jsonl", "--compare").out.splitlines()]
    assert len(lines) == 12 and set(lines[0]) == {"prompt", "completion", "base_prediction", "prediction"}


def test_the_run_is_listed(reft, run):
    assert reft("runs", "ls", "--json").json[0]["run"] == run
    assert reft("runs", "show", run).code == 0


def test_a_run_in_the_way_is_code_2(reft, run):
    done = reft("train", "s.yaml")
    expected = "runs/s exists and has finished. Continue with --resume, start over with --overwrite, or give --name.\n"
    assert (done.code, done.err) == (2, expected)


def test_a_typo_is_code_2(reft, spec):
    done = reft("train", spec, "--set", "train.epoch=3")
    assert done.code == 2 and "did you mean `train.epochs`?" in done.err


def test_data_that_are_not_there_are_code_3(reft, spec):
    done = reft("check", spec, "--set", "data.train=trian.jsonl", "--json")
    assert done.code == 3 and done.error["kind"] == "data"


def test_a_layer_that_is_not_there_is_code_4(reft, spec):
    done = reft("check", spec, "--set", "intervention.layers=[9]")
    assert done.code == 4 and "9" in done.err and not Path("runs").exists()


def test_a_model_that_is_not_there_is_code_4(reft, spec):
    assert reft("check", spec, "--set", "model.name=./nowhere").code == 4


def test_divergence_is_code_6_and_names_the_last_good_checkpoint(reft, spec):
    done = reft("train", spec, "--set", "train.learning_rate=1.0e+38", "--set", "checkpoint.every=1")
    assert done.code == 6 and done.out == "" and "heckpoint" in done.err
    assert RunFolder("runs/s").read()["exit_code"] == 6


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_to_go_on_from(reft, spec, monkeypatch, number, code):
    def stop(self, record: StepRecord) -> None:
        if record.step == 2:  # once: a second signal ends the program
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(progress.PlainProgress, "on_step", stop)
        done = reft("train", spec)
    assert done.code == code and "Go on with: reft train s.yaml --resume" in done.err
    folder = RunFolder("runs/s")
    assert folder.read()["status"] == "interrupted" and folder.read()["exit_code"] == code
    assert 0 < len(folder.checkpoints()) < 6
    assert reft("train", spec, "--resume").out == "runs/s\n"
    assert folder.read()["status"] == "done" and folder.read()["step"] == 6
    assert [line["step"] for line in folder.read_metrics() if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_running_out_of_memory_is_code_5(reft, spec, monkeypatch):
    import torch

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 4 GiB")

    monkeypatch.setattr("reft_cli.training.loop.Trainer.run", full)
    done = reft("train", spec)
    assert done.code == 5 and "Try, in order" in done.err
    assert RunFolder("runs/s").read()["exit_code"] == 5


def test_a_fault_of_ours_is_code_1_with_its_traceback_in_the_run(reft, spec, monkeypatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("reft_cli.training.loop.Trainer._validate", broken)
    done = reft("train", spec)
    assert done.code == 1 and "internal error: ZeroDivisionError: oh" in done.err and "Traceback" not in done.err
    assert RunFolder("runs/s").read()["status"] == "failed"
    assert list(Path("runs/s/logs").glob("reft-error-*.log"))
