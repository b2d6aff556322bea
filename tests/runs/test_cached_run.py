"""A run on kept tokens is the run that tokenizes: the same to the bit, without tokenizing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from reft_cli import runs
from reft_cli.runs import texts
from reft_cli.spec.load import LoadedSpec
from reft_cli.training.observer import NullObserver

KINDS = {
    "answers": ("data.validation=0.3",),
    "classes": ("data.template=null", "task.kind=classification", "task.metric=accuracy"),
    "numbers": ("data.template=null", "task.kind=regression", "task.metric=pearson", "data.columns={label: score}"),
}


def facts(run: Path) -> tuple[object, ...]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    tensors = load_file(run / "last" / "interventions.safetensors")
    return (
        scores,
        {name: tensor.tolist() for name, tensor in tensors.items()},
        json.loads((run / "run.json").read_text())["data"],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_tokenizes_nothing_and_is_the_same(
    make_spec: Callable[..., LoadedSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, observer, kind: str
):
    spec = make_spec(*KINDS[kind])
    plain = runs.train(spec, output=tmp_path / "plain", observer=NullObserver()).run
    monkeypatch.setenv("REFT_CACHE", str(tmp_path / "cache"))
    first = runs.train(spec, output=tmp_path / "first", observer=NullObserver()).run
    monkeypatch.setattr(texts, "encode_examples", None)
    second = runs.train(spec, output=tmp_path / "second", observer=observer).run
    assert facts(plain) == facts(first) == facts(second)
    assert len([text for text in observer.messages if ": tokens from " in text]) == 2


def test_another_row_or_another_length_is_another_entry(
    make_spec: Callable[..., LoadedSpec], data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("REFT_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "train.jsonl"
    copy.write_text((data_dir / "train.jsonl").read_text())

    def entries(*overrides: str) -> int:
        runs.check(make_spec(f"data.train={copy}", "data.validation=null", *overrides), with_model=False)
        return len(list((tmp_path / "cache" / "encoded").iterdir()))

    assert entries() == 2  # training and test rows
    assert entries() == 2
    assert entries("data.max_length=100") == 4
    copy.write_text(copy.read_text() + '{"text": "warm", "label": "yes"}\n')
    assert entries() == 5
