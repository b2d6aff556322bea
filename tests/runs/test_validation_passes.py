"""Losses of rows that are not trained on come from passes like those of training, and are those of padded rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from processes import run_as
from reft_cli import runs
from reft_cli.data.batch import Batch, build_batch
from reft_cli.evaluation import evaluate as evaluation
from reft_cli.runfolder import RunFolder
from reft_cli.runs import assemble, execution
from reft_cli.spec.load import LoadedSpec
from reft_cli.training.loop import Trainer
from reft_cli.training.observer import NullObserver

BUDGET = {True: 120, False: 60}  # tokens of a pass, two rows or more; with and without a template
TEMPLATE = "data.template.prompt=Is this text good or bad? {text} ->"
CLASSES = ("task.kind=classification", "data.template=null", "task.metric=null")
NUMBERS = ("task.kind=regression", "data.template=null", "task.metric=null", "data.columns={label: score}")
PAIRS = ("data.template=null", "intervention.positions=all")
CASES = {
    "no common head": ((), ("packed", False)),
    "shared head": ((TEMPLATE,), ("packed", True)),
    "whole rows": ((TEMPLATE, "train.share_head=off"), ("packed", False)),
    "padded rows": ((TEMPLATE, "train.layout=padded"), ("padded", False)),
    "classes": (CLASSES, ("padded", False)),
    "numbers": (NUMBERS, ("padded", False)),
    "pairs": ((*PAIRS, "task={kind: preference, beta: 0.5}"), ("packed", False)),
    "rated pairs": ((*PAIRS, "task={kind: reward}"), ("padded", False)),
}
MakeSpec = Callable[..., LoadedSpec]


class Pass(NamedTuple):
    """What there is to see of one."""

    layout: str
    shared: bool
    tokens: int
    rows: tuple[int, ...]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """Those in which losses are read, as they come."""
    seen: list[Pass] = []

    def noting(examples: Any, **given: Any) -> Batch:
        batch = build_batch(examples, **given)
        tokens, rows = len(batch.places), tuple(each.row for each in examples)
        seen.append(Pass(given["layout"], given["share_head"], tokens, rows))
        return batch

    monkeypatch.setattr(evaluation, "build_batch", noting)
    return seen


def data_of(sets: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """Where the rows of pairs are, which all begin alike; other rows are the spec's."""
    if sets[:2] != PAIRS:
        return sets
    for split, count in (("train", 16), ("validation", 8)):
        prompts = (f"What would one say of film {'x' * (row % 5)}" for row in range(count))
        rows = [{"prompt": each, "chosen": " good", "rejected": " bad" * (1 + len(each) % 2)} for each in prompts]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (f"data.train={folder}/train.jsonl", f"data.validation={folder}/validation.jsonl", "data.test=null", *sets)


def scored(run: Path) -> dict[str, float]:
    """Scores of the validation rows, in this process."""
    return runs.evaluate(run, split="validation", loss=True, observer=NullObserver()).metrics


@pytest.mark.parametrize("case", CASES)
def test_rows_are_read_as_they_are_trained_on(
    make_spec: MakeSpec, tmp_path: Path, observer: Any, passes: list[Pass], case: str, monkeypatch: pytest.MonkeyPatch
):
    sets, wanted = CASES[case]
    monkeypatch.setitem(assemble.TOKEN_BUDGET, "cpu", BUDGET[TEMPLATE in sets])
    spec = make_spec(*data_of(sets, tmp_path), "train.epochs=1", "train.learning_rate=0.1")
    run = runs.train(spec, output=tmp_path / "run", observer=observer).run
    in_training = passes.copy()
    assert {(each.layout, each.shared) for each in in_training} == {wanted} and len(in_training) > 1
    passes.clear()
    found = scored(run)
    assert passes == in_training
    assert found == pytest.approx(observer.evaluations[-1].metrics, rel=1e-5)
    RunFolder(run).note({"layout": "padded"})
    passes.clear()
    assert scored(run) == pytest.approx(found, rel=1e-5, abs=1e-6)
    assert {each.layout for each in passes} == {"padded"}
    saved = sum(each.tokens for each in passes) - sum(each.tokens for each in in_training)
    assert (saved > 20) == wanted[1], saved  # padding is not counted


@pytest.mark.parametrize("case", ["shared head", "pairs", "rated pairs"])
def test_two_processes_read_the_loss_of_padded_rows(make_spec: MakeSpec, tmp_path: Path, case: str):
    sets, _ = CASES[case]
    spec = make_spec(*data_of(sets, tmp_path), "train.max_steps=1", "evaluation.every=never")
    run = runs.train(spec, output=tmp_path / "run", observer=NullObserver()).run
    first, second = run_as(scored, run)
    RunFolder(run).note({"layout": "padded"})
    assert first == second == pytest.approx(scored(run), rel=1e-5, abs=1e-6)


def test_passes_are_no_larger_than_those_that_were_found_to_fit(
    make_spec: MakeSpec, tmp_path: Path, passes: list[Pass], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Trainer, "fit", lambda _: 50)
    runs.train(make_spec("train.max_steps=1"), output=tmp_path / "run", observer=NullObserver())
    assert max(each.tokens for each in passes) <= 50 and len(passes) >= 2


def test_a_checkpoint_of_no_known_run_is_read_as_is_exact(
    trained: Callable[..., Path], data_dir: Path, passes: list[Pass], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    alone = shutil.copytree((trained(TEMPLATE) / "last").resolve(), tmp_path / "alone")
    data = str(data_dir / "validation.jsonl")

    def loss() -> float:
        return runs.evaluate(alone, data=data, loss=True, observer=NullObserver()).metrics["loss"]

    packed = loss()
    assert {(each.layout, each.shared) for each in passes} == {("packed", True)}
    monkeypatch.setattr(execution, "why_not_shared", lambda _: "its layers look at a whole row")
    passes.clear()
    assert loss() == pytest.approx(packed, rel=1e-5)
    assert {(each.layout, each.shared) for each in passes} == {("packed", False)}
    monkeypatch.setattr(execution, "why_not_packed", lambda _: "its attention has a mask of its own")
    passes.clear()
    assert loss() == pytest.approx(packed, rel=1e-5)
    assert {(each.layout, each.shared) for each in passes} == {("padded", False)}
