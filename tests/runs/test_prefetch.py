"""Runs on batches that a thread builds ahead are runs on batches built one by one, to the bit, and leave no thread."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reft_cli import runs
from reft_cli.data import loader
from reft_cli.data.loader import THREAD, GlobalBatch, Loader
from reft_cli.spec.load import LoadedSpec
from reft_cli.training.observer import NullObserver

MakeSpec = Callable[..., LoadedSpec]


@contextmanager
def at_once(self: Loader, batches: Iterable[Sequence[int]]) -> Iterator[Iterator[GlobalBatch]]:
    """`Loader.ahead` without a thread."""
    yield (self.build(indices) for indices in batches)


def train(spec: LoadedSpec, output: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """(lines of metrics.jsonl without times, the last checkpoint's tensors)."""
    run = runs.train(spec, output=output, observer=NullObserver()).run
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    return scores, load_file(run / "last" / "interventions.safetensors")


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith(THREAD)]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("sets", [(), ("train.micro_batch_size=3", "intervention.dropout=0.2", "train.epochs=3")])
def test_a_run_is_the_same_without_the_thread(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, sets: tuple[str, ...]
):
    spec = make_spec(f"train.layout={layout}", *sets)
    found = train(spec, tmp_path / "ahead")
    monkeypatch.setattr(Loader, "ahead", at_once)
    plain = train(spec, tmp_path / "plain")
    assert found[0] == plain[0]
    torch.testing.assert_close(found[1], plain[1], rtol=0, atol=0)
    assert threads() == []


def test_a_fault_in_the_thread_ends_the_run_in_its_own_words(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, built = loader.build_batch, []

    def failing(*args, **given):
        built.append(None)
        if len(built) == 5:
            raise RuntimeError("the fifth batch is no good")
        return real(*args, **given)

    monkeypatch.setattr(loader, "build_batch", failing)
    with pytest.raises(RuntimeError, match="the fifth batch is no good"):
        train(make_spec("data.validation=null"), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["reason"]) == ("failed", "RuntimeError: the fifth batch is no good")
    assert threads() == []


def test_a_run_that_loses_patience_leaves_no_thread(make_spec: MakeSpec, tmp_path: Path):
    sets = ("train.epochs=20", "train.learning_rate=1e-9", "checkpoint.patience=1", "evaluation.every=1")
    done = runs.train(make_spec(*sets), output=tmp_path / "run", observer=NullObserver())
    assert done.reason == "patience" and done.step < 60
    assert threads() == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_a_gpu_is_the_same_without_the_thread(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
):
    spec = make_spec("model.device=cuda", f"model.dtype={dtype}", "train.deterministic=true", "train.epochs=6")
    found = train(spec, tmp_path / "ahead")
    monkeypatch.setattr(Loader, "ahead", at_once)
    plain = train(spec, tmp_path / "plain")
    assert found[0] == plain[0]
    torch.testing.assert_close(found[1], plain[1], rtol=0, atol=0)
    assert threads() == []
