"""`reft train` with a stand-in for runs.train: its calls, what is printed, and `--resume` with its step."""

import signal
from pathlib import Path

import pytest
import yaml

from reft_cli.cli.train import resume_command, with_step
from reft_cli.errors import Interrupted
from reft_cli.runs import TrainResult

SPEC = "model: bundled:tiny-llama\ndata: {train: bundled:reviews/train}\n"


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(SPEC)
    return "s.yaml"


@pytest.fixture
def calls(monkeypatch):
    """The calls of runs.train, which trains nothing."""
    made = []

    def train(loaded, **flags):
        made.append({"spec": loaded.spec} | flags)
        return TrainResult(Path("runs/s"), 40, {"loss": 0.25}, Path("runs/s/checkpoints/step_000040"), "finished")

    monkeypatch.setattr("reft_cli.runs.train", train)
    return made


def test_stdout_has_the_run_folder_and_nothing_else(reft, spec, calls):
    done = reft("train", spec)
    assert (done.code, done.out) == (0, "runs/s\n")
    assert "finished at step 40: loss 0.25" in done.err
    assert "reft infer runs/s --prompt" in done.err


def test_why_a_run_ended_early(reft, spec, monkeypatch):
    done = TrainResult(Path("my runs/s"), 40, {"loss": 0.25}, None, "patience")
    monkeypatch.setattr("reft_cli.runs.train", lambda loaded, **flags: done)
    said = reft("train", spec).err
    assert "stopped early (checkpoint.patience) at step 40: loss 0.25" in said
    assert "next: reft eval 'my runs/s', or reft infer 'my runs/s' --prompt '...'" in said


def test_quiet_leaves_stderr_empty(reft, spec, calls):
    assert reft("train", spec, "-q").err == ""


def test_the_result_as_json(reft, spec, calls):
    assert reft("train", spec, "--json").json == {
        "run": "runs/s",
        "step": 40,
        "metrics": {"loss": 0.25},
        "best": "runs/s/checkpoints/step_000040",
        "reason": "finished",
    }


def test_flags_reach_the_run(reft, spec, calls):
    reft(
        "train",
        spec,
        "--set",
        "train.epochs=5",
        "--set",
        "train.seed=7",
        "--max-steps",
        9,
        "--name",
        "x",
        "--overwrite",
    )
    reft("train", spec, "--output", "elsewhere")
    first, second = calls
    assert (first["spec"].train.epochs, first["spec"].train.seed, first["spec"].train.max_steps) == (5, 7, 9)
    assert (first["name"], first["overwrite"], first["resume"]) == ("x", True, None)
    assert second["output"] == Path("elsewhere")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["s.yaml"], None),
        (["s.yaml", "--resume"], "last"),
        (["--resume", "s.yaml"], "last"),
        (["--resume", "300", "s.yaml"], "300"),
        (["s.yaml", "--resume", "last", "--json"], "last"),
        (["s.yaml", "--resume=300"], "300"),
        (["s.yaml", "--resume", "-q"], "last"),
    ],
)
def test_resume_with_and_without_a_step(reft, spec, calls, words, meant):
    assert reft("train", *words).code == 0
    assert calls[0]["resume"] == meant


def test_only_a_number_is_taken_for_the_step():
    assert with_step(["--resume", "300.yaml"]) == ["--resume=last", "300.yaml"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resume", "--overwrite"], "--resume goes on with a run and --overwrite deletes it"),
        (["--resume=best"], "--resume best: a step or nothing is needed"),
        (["--name", "../x"], "--name ../x: only letters, digits"),
        (["--max-steps", "0"], "--max-steps"),
        (["--set", "train.epoch=3"], "--set train.epoch=3: train.epoch: unknown key; did you mean `train.epochs`?"),
    ],
)
def test_flags_that_cannot_be(reft, spec, calls, words, said):
    done = reft("train", spec, *words)
    assert done.code == 2 and said in done.err and not calls


def test_a_spec_that_is_not_there(reft, spec, calls):
    done = reft("train", "t.yaml", "--json")
    assert done.code == 2 and done.error["file"] == "t.yaml"


def test_a_dry_run_prints_the_resolved_spec(reft, spec, calls):
    done = reft("train", spec, "--dry-run", "--set", "train.epochs=5")
    resolved = yaml.safe_load(done.out)
    assert resolved["train"]["epochs"] == 5 and resolved["intervention"]["rank"] == 4
    assert "# --set train.epochs=5" in done.out and not calls
    assert yaml.safe_load(reft("train", spec, "--dry-run", "--json").json["resolved"])["version"] == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on(reft, spec, monkeypatch, number, code):
    def train(loaded, **flags):
        raise Interrupted("stopped at step 7", signal=number)

    monkeypatch.setattr("reft_cli.runs.train", train)
    done = reft("train", spec, "--name", "x", "--set", "task.metric=exact_match")
    assert done.code == code
    hint = "Go on with: reft train s.yaml --set task.metric=exact_match --name x --resume"
    assert done.err == f"stopped at step 7\n  {hint}\n"
    assert reft("train", spec, "--json").error["hint"].endswith("reft train s.yaml --resume")


def test_the_command_to_go_on_is_quoted():
    command = resume_command(Path("my spec.yaml"), ["name=a b"], name=None, output=Path("x y"), max_steps=5)
    assert command == "reft train 'my spec.yaml' --set 'name=a b' --output 'x y' --max-steps 5 --resume"
