"""`check` counts what a run would do and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from reft_cli import runs
from reft_cli.errors import ModelError
from reft_cli.spec.load import LoadedSpec

MakeSpec = Callable[..., LoadedSpec]


def test_report_says_what_training_would_do(make_spec: MakeSpec, tmp_path: Path):
    before = set(tmp_path.rglob("*"))
    report = runs.check(make_spec(), rows=2)
    assert (report.steps, report.steps_per_epoch) == (6, 3)
    assert {split: each.counts.used for split, each in report.data.items()} == {
        "train": 20,
        "validation": 6,
        "test": 7,
    }
    model = report.model
    assert model is not None
    assert (model.trainable_parameters, model.sites, model.layers) == (3 * (2 * 32 * 2 + 2), 3, [0, 1, 2])
    assert model.arithmetic == "3 sites × 130 (width 32, rank 2)"
    assert model.estimate.seconds is not None and model.estimate.seconds > 0
    buffers = model.estimate.weights_bytes - 4 * model.base_parameters
    assert 0 < buffers < 100  # the rotary embedding's frequencies
    assert json.loads(json.dumps(report.to_dict()))["steps"] == 6
    assert set(tmp_path.rglob("*")) == before


def test_rendered_row_marks_answer_and_edited_tokens(make_spec: MakeSpec):
    (row,) = runs.check(make_spec(), with_model=False, rows=1).rows
    text = "".join(token.text for token in row.tokens)
    prompt = "".join(token.text for token in row.tokens if token.is_prompt)
    answer = "".join(token.text for token in row.tokens if token.is_answer)
    assert text == prompt + answer
    assert prompt.endswith(" ->")
    assert answer in (" yes<eos>", " no<eos>")
    edited = [index for index, token in enumerate(row.tokens) if token.groups]
    count = sum(token.is_prompt for token in row.tokens)
    assert edited == [0, 1, count - 2, count - 1]


def test_a_model_too_large_to_try_on_a_cpu_is_not_timed(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("reft_cli.runs.estimate.QUICK", 1.0)
    model = runs.check(make_spec()).model
    assert model is not None and model.estimate.seconds is None


def test_rows_that_are_learned_from_are_told_of_where_they_are_scored(make_spec: MakeSpec, data_dir: Path):
    report = runs.check(make_spec(f"data.test={data_dir}/train.jsonl"), with_model=False)
    assert f"{data_dir}/train.jsonl: 20 of 20 rows stand among the training rows too (first: row 1)" in report.warnings


def test_problems_of_training_come_here_too(make_spec: MakeSpec):
    with pytest.raises(ModelError, match="layer 9 does not exist"):
        runs.check(make_spec("intervention.layers=[9]"))
