"""Preference and reward runs from the spec to scores: margins rise, checkpoints give the same scores again."""

import json
import math
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from processes import run_as
from reft_cli import runs
from reft_cli.errors import DataError
from reft_cli.spec.load import load_spec
from reft_cli.tasks.preferences import Preference
from reft_cli.training.loop import Trainer
from reft_cli.training.observer import NullObserver

CPU = runs.BasePlace(device="cpu")
WORDS = ("film", "food", "place", "song", "trip")


def rows(count, seed):
    """The chosen answer ends with `good`, the rejected one with `bad`."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        thing = draw.choice(WORDS)
        made.append({"prompt": f"The {thing}:", "chosen": f" {thing} good", "rejected": f" {thing} bad"})
    return made


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for split, count, seed in (("train", 24, 0), ("validation", 8, 1), ("test", 10, 2)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(count, seed)))
    return folder


def sets(pairs, *more):
    splits = (f"data.{split}={pairs}/{split}.jsonl" for split in ("train", "validation", "test"))
    return (
        *splits,
        "data.template=null",
        "intervention.positions=all",
        "train.epochs=10",
        "train.learning_rate=3e-2",
        *more,
    )


def scores(run, **how):
    return runs.evaluate(run, observer=NullObserver(), place=CPU, **how)


@pytest.mark.parametrize("task", ["{kind: preference, beta: 0.5}", "{kind: reward}"])
def test_margin_and_accuracy_rise_on_held_out_pairs(trained, pairs, task):
    run = trained(*sets(pairs, f"task={task}", "checkpoint.best=loss"))
    report = scores(run, base="compare")
    assert set(report.metrics) == {"loss", "accuracy", "margin"} and report.metric == "accuracy"
    assert report.metrics["accuracy"] == 1.0 > report.base_metrics["accuracy"] - 0.01
    assert report.metrics["margin"] > report.base_metrics["margin"] + 0.5
    assert report.metrics["loss"] < 0.4
    if "preference" in task:
        assert report.base_metrics == {"loss": pytest.approx(math.log(2)), "accuracy": 0.5, "margin": 0.0}
    line = json.loads(next((run / "eval").glob("*.samples.jsonl")).read_text().splitlines()[0])
    assert line["reference"].endswith("good") and line["rejected"].endswith("bad") and line["prediction"] > 0
    assert scores(run, batch_size=1).metrics["margin"] == pytest.approx(report.metrics["margin"], abs=1e-5)


def test_micro_batches_and_resuming_change_nothing(make_spec, pairs, tmp_path, observer):
    given = sets(pairs, "task={kind: preference}", "train.epochs=2", "data.validation=null")
    runs.train(make_spec(*given), output=tmp_path / "whole", observer=observer)
    runs.train(make_spec(*given, "train.micro_batch_size=1"), output=tmp_path / "cut", observer=NullObserver())
    runs.train(make_spec(*given, "train.layout=padded"), output=tmp_path / "padded", observer=NullObserver())
    runs.train(make_spec(*given, "checkpoint.every=3"), output=tmp_path / "part", observer=NullObserver())
    whole = scores(tmp_path / "whole").metrics
    for name in ("cut", "padded", "part"):
        assert scores(tmp_path / name).metrics == pytest.approx(whole, rel=1e-3), name
    resumed = runs.train(
        make_spec(*given, "checkpoint.every=3"), output=tmp_path / "part", resume="3", observer=NullObserver()
    )
    assert resumed.step == 6
    assert scores(tmp_path / "part").metrics == pytest.approx(whole, rel=1e-3)
    assert observer.steps[-1].tokens == 2 * sum(
        len(f"{row['prompt']}{row[each]}") + 1 for row in rows(24, 0) for each in ("chosen", "rejected")
    )


def tensors(run):
    return load_file(run / "last" / "interventions.safetensors")


def test_a_reference_that_is_kept_is_that_of_every_epoch_also_after_resuming(
    make_spec, pairs, tmp_path, monkeypatch, observer
):
    given = sets(pairs, "task={kind: preference}", "train.epochs=3", "data.validation=null", "checkpoint.every=5")
    kept = runs.train(make_spec(*given), output=tmp_path / "kept", observer=observer)
    state = load_file(tmp_path / "kept/last/training.safetensors")["references"]
    assert state.shape == (24, 2) and not state.isnan().any()
    losses = [step.loss for step in observer.steps]

    runs.train(make_spec(*given), output=tmp_path / "part", observer=NullObserver())
    read = []
    inner = Preference.reference
    monkeypatch.setattr(Preference, "reference", lambda self, *batch: read.append(1) or inner(self, *batch))
    runs.train(make_spec(*given), output=tmp_path / "part", resume="5", observer=NullObserver())
    assert not read  # all pairs were read in the first epoch, of three steps
    for name, tensor in tensors(tmp_path / "kept").items():
        assert torch.equal(tensor, tensors(tmp_path / "part")[name]), name

    monkeypatch.setattr(Trainer, "_step", without_references(Trainer._step))
    observer.steps.clear()
    anew = runs.train(make_spec(*given), output=tmp_path / "anew", observer=observer)
    assert len(read) == 9 and kept.step == anew.step == 9
    found = [step.loss for step in observer.steps]
    assert found[:3] == losses[:3] and found == pytest.approx(losses, rel=1e-4)


def train_here(spec_file, given, run, resume):
    """Train in this process, one of several."""
    return runs.train(load_spec(spec_file, overrides=given), output=run, resume=resume, observer=NullObserver()).step


def test_two_processes_keep_the_same_and_resume_in_an_epoch_to_the_bit(spec_file, pairs, tmp_path):
    given = sets(pairs, "task={kind: preference}", "train.epochs=2", "data.validation=null")
    given += ("checkpoint.every=2", "checkpoint.keep=9")
    for resume in (None, "2"):
        assert run_as(train_here, spec_file, given, tmp_path / "two", resume) == [6, 6]
        if resume is None:
            shutil.copytree(tmp_path / "two", tmp_path / "whole", symlinks=True)
    half = load_file(tmp_path / "two/checkpoints/step_000002/training.safetensors")["references"]
    assert int(half.isnan().any(1).sum()) == 8  # of 24 pairs, after two steps of three
    for name in ("interventions.safetensors", "training.safetensors"):
        assert (tmp_path / "two/last" / name).read_bytes() == (tmp_path / "whole/last" / name).read_bytes()
    runs.train(load_spec(spec_file, overrides=given), output=tmp_path / "one", observer=NullObserver())
    for name, tensor in tensors(tmp_path / "one").items():
        torch.testing.assert_close(tensors(tmp_path / "two")[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_reference_of_validation_pairs_is_read_once(make_spec, pairs, tmp_path, monkeypatch, observer):
    read = []
    inner = Preference.reference
    monkeypatch.setattr(Preference, "reference", lambda self, *batch: read.append(1) or inner(self, *batch))
    given = sets(pairs, "task={kind: preference}", "train.epochs=3", "checkpoint.best=loss")
    run = runs.train(make_spec(*given), output=tmp_path / "run", observer=observer).run
    assert len(observer.evaluations) == 3 and len(read) == 3 + 1  # steps of the first epoch, and one validation batch
    scored = runs.evaluate(run, checkpoint="last", split="validation", observer=NullObserver(), place=CPU)
    assert scored.metrics == pytest.approx(observer.evaluations[-1].metrics, rel=1e-5)
    assert len(read) == 5


def without_references(step):
    def changed(self, batch):
        if self.references is not None:
            self.passes, self.references = self.references.passes, None
        return step(self, batch)

    return changed


def test_frozen_activations_that_are_kept_change_nothing(make_spec, pairs, tmp_path):
    given = sets(pairs, "task={kind: preference}", "train.epochs=3", "data.validation=null", "intervention.layers=[2]")
    for name, wanted in (("kept", "on"), ("anew", "off")):
        runs.train(make_spec(*given, f"train.cache_frozen={wanted}"), output=tmp_path / name, observer=NullObserver())
    assert json.loads((tmp_path / "kept/run.json").read_text())["cached"] is True
    assert scores(tmp_path / "kept").metrics == pytest.approx(scores(tmp_path / "anew").metrics, rel=1e-4)


def test_a_preference_run_writes_and_a_reward_run_rates(trained, pairs):
    with runs.open_run(
        trained(*sets(pairs, "task={kind: preference, beta: 0.5}", "checkpoint.best=loss")), place=CPU
    ) as session:
        (answer,) = session.answer(["The film:"], settings={"max_new_tokens": 3})
        assert answer.tokens <= 3 and session.checkpoint.manifest.text.beta == 0.5
    with runs.open_run(trained(*sets(pairs, "task={kind: reward}", "checkpoint.best=loss")), place=CPU) as session:
        asked = [{"prompt": "The film:", "chosen": f" film {word}"} for word in ("good", "bad")]
        good, bad = (float(answer.text) for answer in session.answer(asked, settings={}))
        assert good > bad
        with pytest.raises(DataError, match="no column `chosen`"):
            session.answer(["The film:"], settings={})


def test_check_shows_both_answers(make_spec, pairs):
    report = runs.check(make_spec(*sets(pairs, "task={kind: preference}")), rows=2)
    texts = ["".join(token.text for token in row.tokens) for row in report.rows]
    assert [row.row for row in report.rows] == [1, 1, 2, 2]
    assert "good" in texts[0] and "bad" in texts[1]
    assert report.model.execution.recorded.reason == "there are no CUDA graphs on cpu"


def test_solved_pairs_go_before_the_prompt(make_spec, pairs):
    report = runs.check(make_spec(*sets(pairs, "task={kind: preference}", "data.few_shot=1")), with_model=False)
    text = "".join(token.text for token in report.rows[0].tokens)
    assert text.count("The ") == 2 and text.count("good") == 2
