"""`evaluate`: every source of rows, every metric, the base beside the run, and what is kept."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from reft_cli import runs
from reft_cli.errors import CheckpointError, DataError, SpecError
from reft_cli.evaluation.evaluate import Evaluator
from reft_cli.evaluation.metrics import score_classes, score_loss, score_numbers, score_texts
from reft_cli.runs import assemble
from reft_cli.spec.load import LoadedSpec
from reft_cli.spec.task import FITTING_METRICS
from reft_cli.training.observer import NullObserver

SETS = ("train.epochs=4", "train.learning_rate=0.05", "checkpoint.best=loss", "checkpoint.keep=3")
CLASSES = ("task.kind=classification", "data.template=null")
NUMBERS = ("task.kind=regression", "data.template=null", "data.columns={label: score}")
Trained = Callable[..., Path]


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """A run of one's own."""
    return Path(shutil.copytree(trained(*SETS), tmp_path / "run", symlinks=True))


def evaluate(run: Path, **given: Any) -> runs.EvalReport:
    return runs.evaluate(run, **{"observer": NullObserver()} | given)


def samples(report: runs.EvalReport) -> list[dict[str, Any]]:
    assert report.path is not None
    lines = report.path.with_suffix(".samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_test_split_row_by_row(run: Path, data_dir: Path):
    report = evaluate(run, base="compare", loss=True)
    rows, kept = rows_of(data_dir / "test.jsonl"), samples(report)
    assert (report.rows, report.data, report.metric) == (7, str(data_dir / "test.jsonl"), "exact_match")
    assert [line["row"] for line in kept] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["prompt"] for line in kept] == [f"{row['text']} ->" for row in rows]
    assert [line["reference"].strip() for line in kept] == [row["label"] for row in rows]
    with runs.open_run(run) as session:
        for key, base in (("prediction", False), ("base_prediction", True)):
            answers = session.answer([{"text": row["text"]} for row in rows], settings={}, base=base)
            assert [line[key] for line in kept] == [answer.text for answer in answers]
    assert report.base_metrics["loss"] > report.metrics["loss"]


def test_right_answers_of_either_model_are_counted(run: Path, tmp_path: Path):
    texts = [f"{word} film" for word in ("good", "bad", "warm", "cold", "poor")]
    with runs.open_run(run) as session:
        edited, base = (
            [answer.text.strip() for answer in session.answer(texts, settings={}, base=base)] for base in (False, True)
        )
    assert all(edited) and all(base) and edited != base
    labels = [*edited[:2], *base[2:3], "yes", "no"]
    lines = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    report = evaluate(run, data=str(tmp_path / "own.jsonl"), base="compare")
    expected = [sum(a == b for a, b in zip(answers, labels, strict=True)) / 5 for answers in (edited, base)]
    assert [report.metrics["exact_match"], report.base_metrics["exact_match"]] == expected
    assert expected[0] >= 0.4 and expected[1] >= 0.2


@pytest.mark.parametrize(("split", "count"), [("train", 20), ("validation", 6), ("test", 7)])
def test_splits_of_the_spec(run: Path, split: str, count: int):
    assert evaluate(run, split=split).rows == count


def test_the_validation_score_of_training_is_that_of_evaluation(run: Path):
    best = json.loads((run / "run.json").read_text())["metrics"]["validation_loss"]
    assert evaluate(run, split="validation", checkpoint="best", loss=True).metrics["loss"] == best


def test_rows_that_were_held_out_are_those_of_training(trained: Trained):
    """They could not be scored, and as training rows they were among them."""
    run = trained("data.validation=0.3", "checkpoint.best=loss")
    best = json.loads((run / "run.json").read_text())["metrics"]["validation_loss"]
    assert evaluate(run, split="validation", checkpoint="best", loss=True).metrics["loss"] == best
    held, learned = (samples(evaluate(run, split=split)) for split in ("validation", "train"))
    assert (len(held), len(learned)) == (6, 14)
    assert sorted(line["row"] for line in [*held, *learned]) == list(range(1, 21))
    assert samples(evaluate(run, split="validation", limit=2)) == held[:2]


def test_a_run_that_was_trained_elsewhere(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = trained()
    copy = shutil.copytree(run, tmp_path / "copy", symlinks=True)
    text = (copy / "resolved.yaml").read_text()
    (copy / "resolved.yaml").write_text(re.sub(r"test: .*", "test: data/test.jsonl", text))
    with pytest.raises(DataError, match=r"^data/test\.jsonl: no such file") as caught:
        evaluate(copy)
    hint = "Paths of a run's spec count from where it was trained; go there, or give --data"
    assert caught.value.problems[0].hint == hint


def test_the_settings_of_answers_do_not_name_what_a_head_says(trained: Trained):
    run = trained(*CLASSES, "task.metric=null", "train.epochs=3")
    assert evaluate(run, generation={"beams": 4}).path == evaluate(run).path


def test_other_data_in_another_file(run: Path, data_dir: Path, tmp_path: Path):
    rows = rows_of(data_dir / "validation.jsonl")
    with (tmp_path / "other.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    found, expected = (
        evaluate(run, **what, loss=True) for what in ({"data": str(tmp_path / "other.csv")}, {"split": "validation"})
    )
    assert found.metrics == expected.metrics and found.data == str(tmp_path / "other.csv")
    assert found.path != expected.path and samples(found) == samples(expected)


def test_the_first_rows_and_the_base_alone_replace_nothing(run: Path):
    whole = evaluate(run, base="compare")
    some, base = evaluate(run, limit=3), evaluate(run, base="only")
    assert len({whole.path, some.path, base.path}) == 3
    assert some.rows == 3
    expected = [{k: v for k, v in line.items() if k != "base_prediction"} for line in samples(whole)[:3]]
    assert samples(some) == expected
    assert (base.metrics, base.base_metrics) == ({}, whole.base_metrics)
    assert [line["base_prediction"] for line in samples(base)] == [line["base_prediction"] for line in samples(whole)]
    assert "prediction" not in samples(base)[0]


def test_other_settings_and_other_data_of_the_name_replace_nothing(run: Path, data_dir: Path, tmp_path: Path):
    """A try with --set took the place of the run's own score, and a test.jsonl from elsewhere too."""
    whole = evaluate(run)
    short = evaluate(run, generation={"max_new_tokens": 1, "stop": ["."], "compile": "off"})
    assert short.path.stem.startswith(f"{whole.path.stem}-max_new_tokens_1-stop_")
    (tmp_path / "test.jsonl").write_text((data_dir / "train.jsonl").read_text())
    other = evaluate(run, data=str(tmp_path / "test.jsonl"))
    assert other.path.stem.startswith(f"{whole.path.stem}-") and other.rows == 20
    assert evaluate(run, data=str(tmp_path / "test.jsonl")).path == other.path
    assert evaluate(run).path == whole.path and json.loads(whole.path.read_text())["rows"] == 7
    folder = evaluate(run, data=str(data_dir), split="validation")
    assert folder.path.stem.startswith("validation-step_")


def test_the_result_file_is_the_report(run: Path):
    report = evaluate(run)
    stored = json.loads(report.path.read_text())
    assert {key: stored[key] for key in report.to_dict()} == report.to_dict()
    assert stored["generation"]["max_new_tokens"] == 4 and stored["device"] == "cpu" and stored["versions"]["torch"]


def test_batches_of_one_and_of_four_say_the_same(run: Path, monkeypatch: pytest.MonkeyPatch):
    four = evaluate(run, batch_size=4, loss=True)
    predictions = samples(four)
    monkeypatch.setitem(assemble.TOKEN_BUDGET, "cpu", 1)  # a row at a time for the loss too
    one = evaluate(run, batch_size=1, loss=True)
    assert samples(one) == predictions
    assert one.metrics["loss"] == pytest.approx(four.metrics["loss"], abs=1e-6)
    assert one.metrics["exact_match"] == four.metrics["exact_match"]


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_heads_say_the_same_in_any_batch(trained: Trained, monkeypatch: pytest.MonkeyPatch, kind: str):
    run = trained(*(CLASSES if kind == "classification" else NUMBERS), "task.metric=null", "train.epochs=3")
    many = evaluate(run)
    predictions = [line["prediction"] for line in samples(many)]
    monkeypatch.setitem(assemble.TOKEN_BUDGET, "cpu", 1)
    one = evaluate(run)
    assert one.metrics == pytest.approx(many.metrics, abs=1e-5)
    singly = [line["prediction"] for line in samples(one)]
    assert singly == (predictions if kind == "classification" else pytest.approx(predictions, abs=1e-5))


def test_generation_can_be_changed(run: Path):
    report = evaluate(run, generation={"max_new_tokens": 1})
    assert all(len(line["prediction"].encode()) <= 3 for line in samples(report))
    assert json.loads(report.path.read_text())["generation"]["max_new_tokens"] == 1


def test_answers_that_say_nothing_are_told_of(run: Path, trained: Trained):
    class Listening(NullObserver):
        def __init__(self) -> None:
            self.said: list[tuple[str, str]] = []

        def on_message(self, level: str, text: str) -> None:
            self.said.append((level, text))

    heard = Listening()
    evaluate(run, generation={"max_new_tokens": 1}, observer=heard)
    assert heard.said == [("info", "generation.max_new_tokens 1 was reached before the end in 7 of 7 answers")]
    lost = trained(*SETS, "task.extraction={after: zzz}")
    evaluate(lost, observer=heard)
    assert ("info", "task.extraction found nothing in 7 of 7 answers") in heard.said


def test_answers_are_scored_without_reading_the_loss(run: Path, monkeypatch: pytest.MonkeyPatch):
    both, read = evaluate(run, base="compare", loss=True), []
    monkeypatch.setattr(Evaluator, "_mean_loss", lambda *given, **how: read.append(given))
    report = evaluate(run, base="compare")
    assert list(report.metrics) == list(report.base_metrics) == ["exact_match"] and not read
    assert report.metrics | {"loss": both.metrics["loss"]} == both.metrics
    assert report.base_metrics | {"loss": both.base_metrics["loss"]} == both.base_metrics
    assert samples(report) == samples(both)


@pytest.mark.parametrize("metric", FITTING_METRICS["causal_lm"])
def test_every_metric_of_answers(trained: Trained, metric: str):
    report = evaluate(trained(f"task.metric={metric}", "train.max_steps=1"))
    lines = samples(report)
    if metric in ("loss", "perplexity"):
        expected = score_loss(metric, report.metrics["loss"])
        assert {line["prediction"] for line in lines} == {None}
    else:
        expected = score_texts(metric, [line["prediction"] for line in lines], [line["reference"] for line in lines])
    assert report.metrics[metric] == pytest.approx(expected)


@pytest.mark.parametrize("metric", FITTING_METRICS["classification"])
def test_every_metric_of_classes(trained: Trained, metric: str):
    report = evaluate(trained(*CLASSES, f"task.metric={metric}", "train.epochs=3"))
    numbers = {"no": 0, "yes": 1}
    lines = [{key: numbers.get(value, value) for key, value in line.items()} for line in samples(report)]
    guesses, truths = [line["prediction"] for line in lines], [line["reference"] for line in lines]
    assert set(truths) == {0, 1}
    if metric == "loss":
        assert set(report.metrics) == {"loss"}
    else:
        assert report.metrics[metric] == score_classes(metric, guesses, truths, classes=2)


@pytest.mark.parametrize("metric", FITTING_METRICS["regression"])
def test_every_metric_of_numbers(trained: Trained, metric: str):
    report = evaluate(trained(*NUMBERS, f"task.metric={metric}", "train.epochs=3"))
    lines = samples(report)
    guesses, truths = [line["prediction"] for line in lines], [line["reference"] for line in lines]
    mean = sum((a - b) ** 2 for a, b in zip(guesses, truths, strict=True)) / len(lines)
    assert report.metrics["loss"] == pytest.approx(mean, rel=1e-5)
    if metric != "loss":
        assert report.metrics[metric] == pytest.approx(score_numbers(metric, guesses, truths))


def test_a_checkpoint_alone_needs_only_data(run: Path, data_dir: Path, tmp_path: Path):
    bare = Path(shutil.copytree(run / "best", tmp_path / "elsewhere" / "mine"))
    for name in ("training.json", "training.safetensors"):
        (bare / name).unlink()
    expected, before = evaluate(run), sorted(bare.iterdir())
    shutil.rmtree(run)
    with pytest.raises(SpecError, match=r"mine lies in no run folder, so its data are not known; give --data$"):
        evaluate(bare)
    found = evaluate(bare, data=str(data_dir / "test.jsonl"))
    assert (found.metrics, found.rows, found.path) == (expected.metrics, 7, None)
    assert sorted(bare.iterdir()) == before and list(bare.parent.iterdir()) == [bare]


def test_any_checkpoint_of_a_run(run: Path):
    steps = [int(path.name.removeprefix("step_")) for path in sorted((run / "checkpoints").iterdir())]
    first = evaluate(run, checkpoint=str(steps[0]), loss=True)
    assert first.checkpoint.name == f"step_{steps[0]:06d}" and f"step_{steps[0]:06d}" in first.path.name
    shutil.copytree(run / "last", run / "checkpoints" / "backup")
    backup, last = (
        evaluate(where, checkpoint=which, loss=True)
        for where, which in ((run / "checkpoints" / "backup", None), (run, "last"))
    )
    assert backup.metrics == last.metrics != first.metrics
    assert backup.path == last.path


class Counting(NullObserver):
    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def on_start(self, steps: int, start_step: int, summary: Mapping[str, object]) -> None:
        self.told.append(("start", steps, summary["verb"]))

    def on_progress(self, done: int, total: int) -> None:
        self.told.append((done, total))

    def on_end(self, reason: str) -> None:
        self.told.append(("end", reason))


def test_an_observer_sees_every_row_of_both_models(run: Path):
    observer = Counting()
    evaluate(run, base="compare", batch_size=4, observer=observer)
    progress = [(done, 14) for done in range(1, 15)]
    assert observer.told == [("start", 14, "evaluating"), *progress, ("end", "finished")]


class Killing(Counting):
    """Ends the evaluation after some rows, as a kill would."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def on_start(self, steps: int, start_step: int, summary: Mapping[str, object]) -> None:
        self.told.append((start_step, steps))

    def on_progress(self, done: int, total: int) -> None:
        if done == self.after:
            raise KeyboardInterrupt


def test_the_result_says_how_it_was_decoded(run: Path):
    found = {
        name: json.loads(evaluate(run, generation=changes).path.read_text())["decoded_by"]
        for name, changes in {"plain": {}, "beams": {"beams": 2}}.items()
    }
    assert found == {"plain": "slots", "beams": "beams need a search of their own"}


@pytest.mark.parametrize("tear", [False, True])
def test_a_killed_evaluation_goes_on_where_it_stood(run: Path, tear: bool):
    whole = evaluate(run, base="compare")
    samples = whole.path.with_suffix(".samples.jsonl").read_text()
    for after in (5, 9):
        with pytest.raises(KeyboardInterrupt):
            evaluate(run, base="compare", observer=Killing(after))
    partial = whole.path.with_name(f"{whole.path.stem}.partial.jsonl")
    if tear:
        partial.write_text(partial.read_text() + '{"key": "to')
    last = Killing(-1)
    again = evaluate(run, base="compare", observer=last)
    assert last.told[0] == (9, 14)
    assert (again.metrics, again.base_metrics) == (whole.metrics, whole.base_metrics)
    assert again.path.with_suffix(".samples.jsonl").read_text() == samples
    assert not partial.exists()


def test_answers_of_other_settings_are_not_taken_for_these(run: Path):
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, observer=Killing(4))
    longer = Killing(-1)
    evaluate(run, generation={"max_new_tokens": 2}, observer=longer)
    assert longer.told[0] == (0, 7)


def test_what_cannot_be_evaluated_is_said_in_words(run: Path, make_spec: Callable[..., LoadedSpec], tmp_path: Path):
    with pytest.raises(SpecError, match=r"^--split tests: the run's spec has train, validation and test$"):
        evaluate(run, split="tests")
    with pytest.raises(SpecError, match="--batch-size: input should be greater than or equal to 1"):
        evaluate(run, batch_size=0)
    with pytest.raises(DataError, match="no such file"):
        evaluate(run, data="nowhere.jsonl")
    (tmp_path / "wrong.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(DataError, match=r"wrong.jsonl:1: no column `text`"):
        evaluate(run, data=str(tmp_path / "wrong.jsonl"))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "x" * 600, "label": "yes"}) + "\n")
    with pytest.raises(DataError, match=r"longer than data.max_length 512"):
        evaluate(run, data=str(tmp_path / "long.jsonl"))
    with pytest.raises(CheckpointError, match="no checkpoint `7`"):
        evaluate(run, checkpoint="7")
    runs.train(
        make_spec("data.validation=0.2", "data.test=null", "train.max_steps=1"),
        output=tmp_path / "other",
        observer=NullObserver(),
    )
    with pytest.raises(SpecError, match=r"data\.test: missing"):
        evaluate(tmp_path / "other")
    assert not (tmp_path / "other/eval").exists()


def test_a_label_that_was_not_trained(trained: Trained, tmp_path: Path):
    run = trained(*CLASSES, "task.metric=null", "train.epochs=3")
    (tmp_path / "new.jsonl").write_text('{"text": "a", "label": "maybe"}\n')
    with pytest.raises(DataError, match=r"new.jsonl:1: label `maybe` is not a class of the training data \(no, yes\)"):
        evaluate(run, data=str(tmp_path / "new.jsonl"))
