"""A run trains, writes what it promises, and goes on bit for bit where it stopped."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reft_cli import checkpoint, runfolder, runs
from reft_cli.data.batch import Batch
from reft_cli.errors import (
    CheckpointError,
    DataError,
    Diverged,
    Interrupted,
    MemoryExhausted,
    ModelError,
    ReftError,
    SpecError,
)
from reft_cli.models.intervened import IntervenedModel
from reft_cli.runs.signals import StopSignals
from reft_cli.spec.load import LoadedSpec
from reft_cli.tasks.objectives import CausalLM
from reft_cli.training.observer import NullObserver, StepRecord

MakeSpec = Callable[..., LoadedSpec]
METHODS = ("loreft", "noreft", "direft", "direft_orthogonal", "consreft", "lobireft", "red")


def train(spec: LoadedSpec, output: Path, **kwargs) -> runs.TrainResult:
    return runs.train(spec, output=output, observer=kwargs.pop("observer", NullObserver()), **kwargs)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last" / "interventions.safetensors")


def metrics(run: Path) -> list[dict[str, float]]:
    """All lines of metrics.jsonl but their times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_run_folder_holds_what_it_promises(make_spec: MakeSpec, tmp_path: Path, observer):
    result = train(make_spec(), tmp_path / "run", observer=observer)
    run = result.run
    assert (result.step, result.reason) == (6, "finished")
    for name in ("spec.yaml", "resolved.yaml", "run.json", "metrics.jsonl", "README.md", "best/reft.json"):
        assert (run / name).is_file(), name
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["exit_code"], record["base"]["dtype"]) == ("done", 0, "float32")
    assert record["data"]["train"]["used"] == 20
    lines = metrics(run)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6]
    assert observer.checkpoints == [3, 6]
    assert observer.steps[-1].loss < observer.steps[0].loss
    stored = tensors(run)
    assert set(stored) == {"bank.projection", "bank.source_weight", "bank.source_bias"}
    assert stored["bank.projection"].shape == (3, 2, 32)
    assert sum(f.stat().st_size for f in (run / "last").iterdir()) < 40_000  # nothing of the base


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_reloads_to_the_same_answers(make_spec: MakeSpec, tmp_path: Path, method: str):
    sets = [f"intervention.method={method}"] + (["intervention.rank=null"] if method == "red" else [])
    result = train(make_spec(*sets, "train.epochs=1"), tmp_path / "run")
    state = tensors(result.run)
    fields, settings = [{"text": "good cold"}, {"text": "bad"}], {"max_new_tokens": 6}
    answers = []
    for _ in range(2):
        with runs.open_run(result.run, checkpoint="last") as session:
            assert all(torch.equal(session.model.trainable_state()[name], t) for name, t in state.items())
            answers.append(session.answer(fields, settings=settings))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_head_tasks_train_score_and_reload(make_spec: MakeSpec, tmp_path: Path, kind: str):
    sets = [f"task.kind={kind}", "data.template=null", "task.metric=null"]
    if kind == "regression":
        sets.append("data.columns={label: score}")
    result = train(make_spec(*sets), tmp_path / "run")
    assert any(name.startswith("head.") for name in tensors(result.run))
    report = runs.evaluate(result.run, base="compare", observer=NullObserver())
    assert report.rows == 7
    assert report.metrics["loss"] != report.base_metrics["loss"]
    with runs.open_run(result.run) as session:
        (answer,) = session.answer(["good fine"], settings={})
        many = ["bad", "good fine warm cold", "poor cold", "good fine"]
        together = session.answer(many, settings={})
        assert together == [session.answer([each], settings={})[0] for each in many]
    assert answer.text in ("yes", "no") if kind == "classification" else float(answer.text)


def test_micro_batches_do_not_change_the_result(make_spec: MakeSpec, tmp_path: Path):
    found = [
        tensors(train(make_spec(f"train.micro_batch_size={size}"), tmp_path / str(size)).run) for size in (1, 3, "auto")
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=2e-5)


def test_packed_and_checkpointed_runs_end_like_the_plain_one(make_spec: MakeSpec, tmp_path: Path):
    plain = tensors(train(make_spec(), tmp_path / "plain").run)
    for key in ("train.layout=packed", "train.gradient_checkpointing=true"):
        other = tensors(train(make_spec(key), tmp_path / key.split("=")[0]).run)
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=2e-5)


class Stopping(NullObserver):
    """Sends itself a signal at a step, as a scheduler would."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_step(self, record: StepRecord) -> None:
        if record.step == self.step:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("dropout", ["0.0", "0.3"])
def test_interrupted_and_resumed_is_bitwise_the_whole(
    make_spec: MakeSpec, tmp_path: Path, number: signal.Signals, dropout: str
):
    spec = make_spec(f"intervention.dropout={dropout}", "checkpoint.every=2", "checkpoint.keep=9")
    whole = train(spec, tmp_path / "whole")
    with pytest.raises(Interrupted) as caught:
        train(spec, tmp_path / "cut", observer=Stopping(3, number))
    assert caught.value.exit_code == 128 + number
    assert json.loads((tmp_path / "cut/run.json").read_text())["status"] == "interrupted"
    resumed = train(spec, tmp_path / "cut", resume="last")
    assert resumed.step == whole.step
    for name in ("interventions.safetensors", "training.safetensors"):
        assert (resumed.run / "last" / name).read_bytes() == (whole.run / "last" / name).read_bytes()
    assert metrics(whole.run) == metrics(resumed.run)


@pytest.mark.parametrize("kind", ["causal_lm", "loss", "classification", "last step"])
def test_a_signal_cuts_a_validation_short_and_resuming_makes_it(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, observer, kind: str
):
    """The signal comes while the first row is scored; schedulers do not wait for the others."""
    sets = ("task.kind=classification", "data.template=null", "task.metric=null") if kind == "classification" else ()
    sets = ("task.metric=loss",) if kind == "loss" else sets
    spec = make_spec(*sets, *(("evaluation.every=6",) if kind == "last step" else ()))
    whole = train(spec, tmp_path / "whole")
    stop, calls = StopSignals.stop, 0

    def stopping(signals: StopSignals, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        signal.raise_signal(signal.SIGTERM)
        stop(signals, done, total)

    with monkeypatch.context() as patched:
        patched.setattr(StopSignals, "stop", stopping)
        step = 6 if kind == "last step" else 3
        with pytest.raises(Interrupted, match=f"^stopped by SIGTERM at step {step}$"):
            train(spec, tmp_path / "cut", observer=observer)
    assert calls == 1 and not observer.evaluations
    assert not any("validation_loss" in line for line in metrics(tmp_path / "cut"))
    lines = (whole.run / "metrics.jsonl").read_text().splitlines()
    (made,) = (line for line in lines if f'"step": {step},' in line and "validation_loss" in line)
    with (tmp_path / "cut/metrics.jsonl").open("a") as file:  # of a process that made it and was killed before it saved
        file.write(made + "\n")
    resumed = train(spec, tmp_path / "cut", resume="last")
    assert (resumed.step, resumed.reason, resumed.metrics) == (whole.step, whole.reason, whole.metrics)
    assert metrics(whole.run) == metrics(resumed.run)
    for link in ("best", "last"):
        assert (resumed.run / link).resolve().name == (whole.run / link).resolve().name
        for name in ("interventions.safetensors", "training.safetensors"):
            assert (resumed.run / link / name).read_bytes() == (whole.run / link / name).read_bytes()


def test_resume_from_a_step(make_spec: MakeSpec, tmp_path: Path):
    spec = make_spec("checkpoint.every=2", "checkpoint.keep=9")
    whole = train(spec, tmp_path / "run")
    before = tensors(whole.run)
    resumed = train(spec, tmp_path / "run", resume="2")
    assert resumed.step == 6
    torch.testing.assert_close(tensors(resumed.run), before, rtol=0, atol=0)


def test_resume_refuses_what_would_change_the_result(make_spec: MakeSpec, tmp_path: Path, observer):
    train(make_spec("train.max_steps=2"), tmp_path / "run")
    limited = make_spec("evaluation.limit=2")  # scores of other rows; it was said that the rows themselves had changed
    with pytest.raises(SpecError, match=r"was begun with other settings.*evaluation\.limit: None -> 2"):
        train(limited, tmp_path / "run", resume="last")
    with pytest.raises(SpecError, match=r"was begun with other settings.*train\.learning_rate: 0\.01 -> 0\.02"):
        train(make_spec("train.learning_rate=0.02"), tmp_path / "run", resume="last")
    with pytest.raises(SpecError) as caught:
        train(make_spec('data.template.prompt="{text}\\n->' + "x" * 300 + '"'), tmp_path / "run", resume="last")
    line = str(caught.value)
    assert r"data.template.prompt: {text} -> -> {text}\n->xxx" in line and line.isprintable() and "…. Put them" in line
    train(make_spec("checkpoint.keep=3"), tmp_path / "run", resume="last", observer=observer)
    assert "changed since the run was begun: checkpoint.keep: 2 -> 3" in observer.messages


def test_existing_run_is_not_touched(make_spec: MakeSpec, tmp_path: Path):
    train(make_spec("train.max_steps=1"), tmp_path / "run")
    before = tensors(tmp_path / "run")
    with pytest.raises(SpecError, match="exists and has finished"):
        train(make_spec(), tmp_path / "run")
    with pytest.raises(DataError):
        train(make_spec("data.train=missing.jsonl"), tmp_path / "run", overwrite=True)
    torch.testing.assert_close(tensors(tmp_path / "run"), before, rtol=0, atol=0)


def rate_from(monkeypatch: pytest.MonkeyPatch, step: int, rate: float) -> None:
    """Learn with another rate from a step on."""

    def factor(done: int, **_: object) -> float:
        return rate if done + 1 >= step else 1.0

    monkeypatch.setattr("reft_cli.training.loop.rate_factor", factor)


@pytest.mark.parametrize(("bad", "good"), [(4, "step_000003"), (1, None)])
def test_a_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int, good: str | None
):
    """The checkpoint of the bad step itself, whose loss was still good, is not the one."""
    rate_from(monkeypatch, bad, 1e30)
    spec = make_spec("train.max_grad_norm=null", "checkpoint.every=1", "checkpoint.keep=9", "train.epochs=8")
    with pytest.raises(Diverged, match=rf"^loss is nan at step {bad + 1} \(rows .*\), learning rate ") as caught:
        train(spec, tmp_path / "run")
    named = f"Last good checkpoint: checkpoints/{good}." if good else "There is no checkpoint from before that."
    assert named in str(caught.value)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (record["status"], record["exit_code"]) == ("failed", 6)


def test_losses_that_explode_stop_and_name_where_it_began(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    passes, whole = 0, CausalLM.loss

    def loss(task: CausalLM, model: IntervenedModel, batch: Batch) -> torch.Tensor:
        nonlocal passes
        passes += 1  # one a step
        return whole(task, model, batch) * (30 if passes >= 60 else 1)

    monkeypatch.setattr(CausalLM, "loss", loss)
    spec = make_spec("checkpoint.every=10", "checkpoint.keep=9", "train.epochs=40", "evaluation.every=never")
    with pytest.raises(Diverged) as caught:
        train(spec, tmp_path / "run")
    assert re.match(r"loss rose to 1\d\d from 5\.\d+ \(medians\) at step 7[45] since step 60, ", str(caught.value))
    assert "Last good checkpoint: checkpoints/step_000050." in str(caught.value)


def test_a_gradient_that_is_not_finite_stops_before_its_weights_are_saved(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lengths = iter([1.0, 1.0, math.nan])

    def clip(*_: object, **__: object) -> torch.Tensor:
        return torch.tensor(next(lengths))

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", clip)
    with pytest.raises(Diverged, match=r"^loss has a gradient of length nan at step 3 \(rows "):
        train(make_spec("checkpoint.every=1", "checkpoint.keep=9"), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step_000001", "step_000002"]


def test_out_of_memory_gives_advice(make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.40 GiB. GPU 0 has 23.7 GiB")

    monkeypatch.setattr("reft_cli.tasks.objectives.CausalLM.loss", no_memory)
    with pytest.raises(
        MemoryExhausted, match=r"Try, in order: train.micro_batch_size: 1; train.gradient_checkpointing"
    ):
        train(make_spec(), tmp_path / "run")
    assert json.loads((tmp_path / "run/run.json").read_text())["exit_code"] == 5


def test_best_is_kept_patience_ends_and_old_checkpoints_go(make_spec: MakeSpec, tmp_path: Path):
    sets = ("checkpoint.best=exact_match", "checkpoint.patience=2", "checkpoint.every=1", "checkpoint.keep=1")
    spec = make_spec(*sets, "evaluation.every=1", "train.learning_rate=1e-9", "train.epochs=9")
    result = train(spec, tmp_path / "run")
    assert result.reason == "patience"
    lines = metrics(result.run)
    assert [line["validation_exact_match"] for line in lines if "validation_loss" in line] == [0.0, 0.0, 0.0]
    assert result.best is not None and result.best.name == "step_000001"
    assert {path.name for path in (result.run / "checkpoints").iterdir()} == {"step_000001", "step_000003"}


def test_validation_can_be_a_fraction_and_layers_a_list(make_spec: MakeSpec, tmp_path: Path):
    result = train(
        make_spec("data.validation=0.2", "intervention.layers=[0, 2]", "train.max_steps=1"), tmp_path / "run"
    )
    record = json.loads((result.run / "run.json").read_text())
    assert (record["data"]["train"]["used"], record["data"]["validation"]["used"]) == (16, 4)
    assert tensors(result.run)["bank.projection"].shape[0] == 2


def test_tensorboard_gets_the_metrics(make_spec: MakeSpec, tmp_path: Path):
    result = train(make_spec("log=[tensorboard]", "train.max_steps=2"), tmp_path / "run")
    assert list(result.run.rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    ("override", "error", "text"),
    [
        ("intervention.layers=[7]", ModelError, "intervention.layers: layer 7 does not exist; .* has layers 0-2"),
        ("intervention.component=mlp.nope.input", ModelError, "`mlp.nope.input` is not in model.layers.0"),
        ("model.device=cuda:9", ModelError, r"model.device: cuda:9 does not exist; this machine has \w+ CUDA devices"),
        ("model.name=./nowhere", ModelError, r"^\./nowhere: no such folder"),
        ("data.train=nowhere.jsonl", DataError, "nowhere.jsonl"),
        ("data.max_length=8", DataError, "rows are longer than data.max_length 8"),
        ("data.train=null", SpecError, "data.train: missing; name a file"),
        ("log=[mlflow]", SpecError, "log: mlflow is not installed: pip install mlflow"),
        ("intervention.rank=99", SpecError, "intervention.rank: 99 is more than the 32 dimensions"),
    ],
)
def test_what_cannot_be_is_said_before_a_folder_is_made(
    make_spec: MakeSpec, tmp_path: Path, override: str, error: type[Exception], text: str
):
    with pytest.raises(error, match=text):
        train(make_spec(override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_training_state_is_refused(make_spec: MakeSpec, tmp_path: Path):
    result = train(make_spec("train.max_steps=2"), tmp_path / "run")
    (result.run / "last" / "training.json").write_text("{}x")
    with pytest.raises(CheckpointError, match=r"training\.json: damaged: not JSON$"):
        train(make_spec(), tmp_path / "run", resume="last")


def test_resuming_takes_the_newest_whole_checkpoint(make_spec: MakeSpec, tmp_path: Path, observer):
    spec = make_spec("checkpoint.every=2", "checkpoint.keep=9", "evaluation.every=never")
    whole = train(spec, tmp_path / "whole")
    run = Path(shutil.copytree(whole.run, tmp_path / "run", symlinks=True))
    weights = run / "checkpoints/step_000006/interventions.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    (run / "checkpoints/step_000004/training.json").unlink()
    resumed = train(spec, run, resume="last", observer=observer)
    (told,) = [text for text in observer.messages if "passed over" in text]
    assert told.startswith(f"{weights}: damaged") and told.endswith("passed over for the newest whole one, of step 2")
    assert metrics(resumed.run) == metrics(whole.run)
    same_end(resumed.run, whole.run)
    (run / "checkpoints/step_000004/training.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no training\.json"):  # that one was asked for
        train(spec, run, resume="4")


class Failing(NullObserver):
    """Ends the run at a step with an error."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_step(self, record: StepRecord) -> None:
        if record.step == self.step:
            raise self.error


def same_end(run: Path, whole: Path) -> None:
    """Both runs ended with the same weights, moments and metrics, bit for bit."""
    for name in ("interventions.safetensors", "training.safetensors"):
        assert (run / "last" / name).read_bytes() == (whole / "last" / name).read_bytes()
    assert metrics(run) == metrics(whole)
    assert (run / "best").resolve().name == (whole / "best").resolve().name


def test_a_run_without_a_checkpoint_starts_over(make_spec: MakeSpec, tmp_path: Path, observer):
    whole = train(make_spec(), tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        train(make_spec(), tmp_path / "cut", observer=Failing(2, ZeroDivisionError()))
    assert not list((tmp_path / "cut/checkpoints").iterdir())
    same_end(train(make_spec(), tmp_path / "cut", resume="last", observer=observer).run, whole.run)
    assert "no checkpoint yet: starting over" in observer.messages


@pytest.mark.parametrize("missing", ["write_spec", "begin"])
def test_a_start_that_was_killed_is_no_obstacle(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
):
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(f"reft_cli.runfolder.RunFolder.{missing}", killed)
        train(make_spec(), tmp_path / "run")
    resume = "last" if (tmp_path / "run/run.json").exists() else None
    assert train(make_spec(), tmp_path / "run", resume=resume).step == 6


def test_a_resume_that_is_refused_leaves_the_record_and_the_lock(make_spec: MakeSpec, tmp_path: Path):
    run = train(make_spec(), tmp_path / "run").run
    before = (run / "run.json").read_text()
    with pytest.raises(CheckpointError, match="no checkpoint `99`; there are last and the steps 3, 6"):
        train(make_spec(), run, resume="99")
    with pytest.raises(SpecError, match="other settings"):
        train(make_spec("train.seed=1"), run, resume="last")
    (run / "last" / "reft.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        train(make_spec(), run, resume="6")
    assert (run / "run.json").read_text() == before
    assert run.resolve() not in runfolder._locks


def test_an_overwrite_that_cannot_start_leaves_the_old_run(make_spec: MakeSpec, tmp_path: Path):
    run = train(make_spec("train.max_steps=1"), tmp_path / "run").run
    wrong = make_spec("task.kind=classification", "data.template=null", "task.metric=null", "train.layout=packed")
    with pytest.raises(ModelError, match="packed would not be exact"):
        train(wrong, run, overwrite=True)
    assert tensors(run)


def test_nothing_is_loaded_for_a_folder_that_is_in_the_way(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        sys.modules["reft_cli.runs.train"], "load_tokenizer", None
    )  # the package has a function `train`
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(SpecError, match="is not a run"):
        train(make_spec(), tmp_path, overwrite=True)
    with pytest.raises(SpecError, match="nothing to resume"):
        train(make_spec(), tmp_path / "run", resume="last")


@pytest.mark.parametrize("file", [1, 3, 4])
def test_a_full_disk_is_one_line_and_the_run_can_go_on(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: int
):
    spec, inner, left = make_spec("checkpoint.every=2", "checkpoint.keep=9"), checkpoint.write_synced, [4 + file]

    def full(path: Path, data: bytes) -> None:
        left[0] -= 1
        if left[0] == 0:  # in the second checkpoint
            path.write_bytes(data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        inner(path, data)

    whole = train(spec, tmp_path / "whole").run
    run = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(ReftError) as caught:
        patched.setattr(checkpoint, "write_synced", full)
        train(spec, run)
    message = f"{run}: no space left on device. Put that right and go on with --resume."
    assert (type(caught.value), str(caught.value), caught.value.code) == (ReftError, message, 1)
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["exit_code"], record["reason"]) == ("failed", 1, message)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]
    same_end(train(spec, run, resume="last").run, whole)


def test_a_disk_without_room_for_the_record_either(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    class Filling(NullObserver):
        def on_step(self, record: StepRecord) -> None:
            monkeypatch.setattr("reft_cli.runfolder.write_atomic", full)

    monkeypatch.setattr("reft_cli.runfolder.RunFolder.append_metrics", full)
    with pytest.raises(ReftError, match=r"^metrics.jsonl: no space left on device\. Put that right"):
        train(make_spec(), tmp_path / "run", observer=Filling())
    assert (tmp_path / "run").resolve() not in runfolder._locks


def test_a_folder_that_was_taken_away_is_no_fault_of_ours(make_spec: MakeSpec, tmp_path: Path):
    class Removing(NullObserver):
        def on_step(self, record: StepRecord) -> None:
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(ReftError, match=r"run/metrics.jsonl: no such file or directory\. Put that right"):
        train(make_spec(), tmp_path / "run", observer=Removing())


def test_a_file_that_is_missing_elsewhere_is_a_fault_of_ours(make_spec: MakeSpec, tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        train(make_spec(), tmp_path / "run", observer=Failing(1, FileNotFoundError(2, "No such file", "/elsewhere")))
