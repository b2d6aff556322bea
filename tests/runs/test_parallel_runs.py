"""A run on two gloo processes: the numbers of one process, one folder, one voice, and one end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from processes import run_as
from reft_cli import runs
from reft_cli.errors import ReftError, exit_code
from reft_cli.evaluation.answers import AnswerStore
from reft_cli.runfolder import RunFolder
from reft_cli.spec.load import load_spec
from reft_cli.training import loop
from reft_cli.training.observer import NullObserver, StepRecord

CLOSE = {"rtol": 1e-4, "atol": 2e-6}


class Watching(NullObserver):
    """Keeps each step's loss and gradient norm; at a step it may send this process a signal."""

    def __init__(self, at: int = 0, number: int = 0) -> None:
        self.at, self.number = at, number
        self.steps: list[tuple[int, float, float]] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append((record.step, record.loss, record.grad_norm))
        if record.step == self.at:
            os.kill(os.getpid(), self.number)


def train_here(spec: Path, sets: Sequence[str], run: Path, given: dict[str, Any], watching: Watching) -> dict[str, Any]:
    """Train in this process, one of several; what it saw, and how it ended."""
    gradients: list[list[Any]] = []
    inner = loop.add_up

    def note(tensors: list[torch.Tensor]) -> None:
        inner(tensors)
        gradients.append([tensor.tolist() for tensor in tensors])

    loop.add_up = note
    try:
        done = runs.train(load_spec(spec, overrides=sets), output=run, observer=watching, **given)
    except ReftError as error:
        return {"error": f"{error}", "code": exit_code(error), "steps": watching.steps}
    finally:
        loop.add_up = inner
    return {"metrics": done.metrics, "reason": done.reason, "steps": watching.steps, "gradients": gradients}


def train_as(
    count: int, spec: Path, run: Path, *sets: str, watching: Watching | None = None, **given: Any
) -> list[dict[str, Any]]:
    arguments = (spec, sets, run, given, watching or Watching())
    return run_as(train_here, *arguments, count=count) if count > 1 else [train_here(*arguments)]


def numbers(gradients: list[list[Any]]) -> list[list[torch.Tensor]]:
    return [[torch.tensor(each) for each in step] for step in gradients]


def lines(run: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last" / "interventions.safetensors")


@pytest.mark.parametrize(
    "sets",
    [
        (),
        ("train.layout=packed", "train.global_batch_size=7", "train.micro_batch_size=1"),
        ("data.template.prompt=Is this text good or bad? {text} ->",),
        ("task.kind=classification", "data.template=null", "task.metric=null"),
        ("intervention.method=red", "intervention.rank=null", "train.global_batch_size=1", "train.max_steps=3"),
    ],
    ids=["padded", "packed", "shared head", "head", "fewer rows than processes"],
)
def test_two_processes_train_like_one(spec_file: Path, tmp_path: Path, sets: tuple[str, ...]):
    (alone,) = train_as(1, spec_file, tmp_path / "one", *sets)
    first, second = train_as(2, spec_file, tmp_path / "two", *sets)
    assert len(alone["gradients"]) == len(alone["steps"]) >= 3
    torch.testing.assert_close(numbers(first["gradients"]), numbers(alone["gradients"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first["steps"], alone["steps"], rtol=1e-5, atol=1e-6)
    assert second["gradients"] == first["gradients"]
    assert first["metrics"] == second["metrics"] and second["steps"] == []  # only the first one speaks
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), **CLOSE)
    assert [sorted(line) for line in lines(tmp_path / "two")] == [sorted(line) for line in lines(tmp_path / "one")]
    torch.testing.assert_close(lines(tmp_path / "two"), lines(tmp_path / "one"), rtol=1e-4, atol=1e-5)
    record = RunFolder(tmp_path / "two").read()
    assert (record["processes"], record["devices"], record["status"]) == (2, ["cpu", "cpu"], "done")
    files = [sorted(file.name for file in (tmp_path / run).rglob("*")) for run in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2)])
def test_a_run_goes_on_with_another_number_of_processes(spec_file: Path, tmp_path: Path, before: int, after: int):
    train_as(1, spec_file, tmp_path / "whole")
    stop = Watching(at=3, number=signal.SIGTERM)  # before the validation of that step, which is made on resuming
    for found in train_as(before, spec_file, tmp_path / "run", watching=stop):
        assert (found["code"], found["error"]) == (143, "stopped by SIGTERM at step 3")
    record = RunFolder(tmp_path / "run").read()
    assert (record["status"], record["exit_code"], record["processes"]) == ("interrupted", 143, before)
    for found in train_as(after, spec_file, tmp_path / "run", resume="last"):
        assert found["reason"] == "finished"
    torch.testing.assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"), **CLOSE)
    torch.testing.assert_close(lines(tmp_path / "run"), lines(tmp_path / "whole"), rtol=1e-4, atol=1e-5)


def test_two_processes_with_dropout_resume_bitwise(spec_file: Path, tmp_path: Path):
    sets = ("intervention.dropout=0.3",)
    train_as(2, spec_file, tmp_path / "whole", *sets)
    train_as(2, spec_file, tmp_path / "cut", *sets, watching=Watching(at=2, number=signal.SIGINT))
    train_as(2, spec_file, tmp_path / "cut", *sets, resume="last")
    for name in ("interventions.safetensors", "training.safetensors"):
        assert (tmp_path / "cut/last" / name).read_bytes() == (tmp_path / "whole/last" / name).read_bytes()


def test_sigusr1_saves_and_goes_on(spec_file: Path, tmp_path: Path):
    sets = ("checkpoint.keep=9", "evaluation.every=never", "checkpoint.every=6")
    for count in (1, 2):
        found = train_as(count, spec_file, tmp_path / str(count), *sets, watching=Watching(2, signal.SIGUSR1))
        assert [each["reason"] for each in found] == ["finished"] * count
        kept = [path.name for path in RunFolder(tmp_path / str(count)).checkpoints()]
        assert kept == ["step_000003", "step_000006"]  # asked for while step 2 was reported


def ended(spec: Path, run: Path, target: str, error: BaseException, failing: int) -> Any:
    """Train in this process; in the failing one, `target` raises."""
    module, _, name = target.rpartition(".")
    owner: Any = __import__("pydoc").locate(f"reft_cli.{module}")
    inner = getattr(owner, name)

    def fail(*given: Any, **named: Any) -> Any:
        if os.environ["RANK"] == str(failing):
            raise error
        return inner(*given, **named)

    setattr(owner, name, fail)
    return train_here(spec, (), run, {}, Watching())


MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 4 GiB")
FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("target", "error", "failing", "code", "said"),
    [
        ("tasks.objectives.CausalLM.loss", MEMORY, 1, 5, "Try, in order: train.micro_batch_size: 1"),
        ("generation.settings.end_tokens", MEMORY, 1, 5, "CUDA out of memory"),
        ("runfolder.RunFolder.append_metrics", FULL, 0, 1, "no space left on device. Put that right and go on with"),
        ("runs.assemble.check_fits", ReftError("no such tokenizer"), 1, 1, "no such tokenizer"),
    ],
)
def test_what_ends_one_process_ends_both_alike(spec_file: Path, tmp_path: Path, target, error, failing, code, said):
    found = run_as(ended, spec_file, tmp_path / "run", target, error, failing)
    assert found[0] == found[1] | {"steps": found[0]["steps"]}
    assert found[0]["code"] == code and said in found[0]["error"]
    run = RunFolder(tmp_path / "run")
    if run.exists():
        assert (run.read()["status"], run.read()["exit_code"]) == ("failed", code)


def diverged(spec: Path, run: Path) -> Any:
    return train_here(spec, ("train.learning_rate=1.0e+38",), run, {}, Watching())


def test_both_processes_see_a_divergence(spec_file: Path, tmp_path: Path):
    first, second = run_as(diverged, spec_file, tmp_path / "run")
    assert first["error"] == second["error"] and first["code"] == second["code"] == 6


def evaluated(run: Path) -> dict[str, Any]:
    """Score a run in this process."""
    report = runs.evaluate(run, base="compare", loss=True, observer=NullObserver())
    return {"metrics": report.metrics, "base": report.base_metrics, "rows": report.rows}


@pytest.mark.parametrize("kind", ["causal_lm", "classification"])
def test_an_evaluation_is_shared_out(trained, tmp_path: Path, kind: str):
    sets = (f"task.kind={kind}", "data.template=null", "task.metric=null") if kind == "classification" else ()
    run = trained(*sets)
    alone = evaluated(run)
    samples = {path.name: path.read_text() for path in (run / "eval").glob("*.samples.jsonl")}
    first, second = run_as(evaluated, run)
    assert first == second
    torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-6)
    assert samples == {path.name: path.read_text() for path in (run / "eval").glob("*.samples.jsonl")}


def evaluated_until_full(run: Path) -> str:
    """Score a run in this process until the disk is full after one answer more."""
    add = AnswerStore.add

    def once(store: AnswerStore, *given: Any) -> None:
        add(store, *given)
        raise FULL

    AnswerStore.add = once  # type: ignore[method-assign]
    try:
        runs.evaluate(run, observer=NullObserver())
    except OSError as error:
        return str(error)
    return "finished"


class Starting(NullObserver):
    """Keeps how many rows an evaluation began with."""

    known = 0

    def on_start(self, steps: int, start_step: int, summary: Mapping[str, object]) -> None:
        self.known = start_step


@pytest.mark.parametrize("after", [1, 2])
def test_an_evaluation_goes_on_with_the_answers_of_all_processes(trained, after: int):
    run = trained()
    wanted = evaluated(run)["metrics"]
    assert run_as(evaluated_until_full, run) == [str(FULL)] * 2
    assert len(list((run / "eval").glob("*.partial*.jsonl"))) == 2
    if after == 1:
        starting = Starting()
        assert runs.evaluate(run, loss=True, observer=starting).metrics == wanted and starting.known == 2
    else:
        first, second = run_as(evaluated, run)
        assert first == second
        torch.testing.assert_close(first["metrics"], wanted, rtol=1e-5, atol=1e-6)
    assert not list((run / "eval").glob("*.partial*"))


def test_a_launcher_that_started_another_number(spec_file: Path, tmp_path: Path):
    found = train_as(2, spec_file, tmp_path / "run", "parallel.processes=3")
    assert {each["error"] for each in found} == {"parallel.processes: 3, and the launcher started 2; write auto"}


def interrupted_elsewhere(spec: Path, run: Path) -> Any:
    """Only the second process gets the signal."""
    if os.environ["RANK"] == "1":
        inner = loop.Trainer._step

        def step(self: loop.Trainer, examples: list[Any]) -> Any:
            if self.progress.step == 2:
                signal.raise_signal(signal.SIGTERM)
            return inner(self, examples)

        loop.Trainer._step = step  # type: ignore[method-assign]
    return train_here(spec, (), run, {}, Watching())


def test_a_signal_to_one_process_stops_all_at_the_same_step(spec_file: Path, tmp_path: Path):
    found = run_as(interrupted_elsewhere, spec_file, tmp_path / "run")
    assert [(each["code"], each["error"]) for each in found] == [(143, "stopped by SIGTERM at step 3")] * 2
    assert RunFolder(tmp_path / "run").linked("last") == RunFolder(tmp_path / "run").checkpoint(3)
