"""The main path on a GPU: it gives what the CPU gives, in every type, and scores alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reft_cli import runs
from reft_cli.spec.load import LoadedSpec
from reft_cli.training.observer import NullObserver

pytestmark = pytest.mark.gpu
MakeSpec = Callable[..., LoadedSpec]
QUIET = NullObserver()


def losses(spec: LoadedSpec, output: Path, remembering) -> list[float]:
    runs.train(spec, output=output, observer=remembering)
    return [record.loss for record in remembering.steps]


def test_float32_losses_are_those_of_the_cpu(make_spec: MakeSpec, tmp_path: Path, observer):
    on_cpu = losses(make_spec("model.device=cpu"), tmp_path / "cpu", observer)
    observer.steps.clear()
    for layout in ("padded", "packed"):
        sets = ("model.device=cuda", "model.dtype=float32", f"train.layout={layout}")
        on_gpu = losses(make_spec(*sets), tmp_path / layout, observer)
        observer.steps.clear()
        torch.testing.assert_close(on_gpu, on_cpu, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_learn_and_reload(make_spec: MakeSpec, tmp_path: Path, observer, dtype: str):
    sets = ("model.device=cuda", f"model.dtype={dtype}", "train.epochs=6", "train.gradient_checkpointing=true")
    found = losses(make_spec(*sets), tmp_path / "run", observer)
    assert found[-1] < found[0] - 0.1
    first = runs.evaluate(tmp_path / "run", observer=QUIET, place=runs.BasePlace(device="cuda"))
    second = runs.evaluate(tmp_path / "run", observer=QUIET, place=runs.BasePlace(device="cuda"))
    assert first.metrics == second.metrics


def test_flash_attention_over_packed_rows_trains_like_padding(make_spec: MakeSpec, tmp_path: Path, observer):
    found = {}
    for layout in ("padded", "packed"):
        sets = ("model.device=cuda", "model.dtype=bfloat16", f"train.layout={layout}")
        found[layout] = losses(make_spec(*sets), tmp_path / layout, observer)
        observer.steps.clear()
    torch.testing.assert_close(found["packed"], found["padded"], rtol=2e-2, atol=2e-2)  # bfloat16 rounds at 2^-8


def test_a_gpu_checkpoint_answers_the_same_on_a_cpu(make_spec: MakeSpec, tmp_path: Path):
    runs.train(make_spec("model.device=cuda", "model.dtype=float32"), output=tmp_path / "run", observer=QUIET)
    answers = []
    for device in ("cuda", "cpu"):
        with runs.open_run(tmp_path / "run", place=runs.BasePlace(device=device)) as session:
            answers.append(session.answer([{"text": "good"}, {"text": "cold bad"}], settings={}))
    assert answers[0] == answers[1]


def test_deterministic_runs_are_bitwise_equal(make_spec: MakeSpec, tmp_path: Path):
    spec = make_spec("model.device=cuda", "train.deterministic=true", "intervention.dropout=0.1")
    stored = []
    for name in ("a", "b"):
        runs.train(spec, output=tmp_path / name, observer=QUIET)
        stored.append((tmp_path / name / "last/interventions.safetensors").read_bytes())
    assert stored[0] == stored[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_goes_on_from_a_step_as_it_went(make_spec: MakeSpec, tmp_path: Path, dtype: str):
    sets = ("train.deterministic=true", "intervention.dropout=0.1", "checkpoint.every=1", "checkpoint.keep=9")
    spec = make_spec("model.device=cuda", f"model.dtype={dtype}", *sets)
    last = tmp_path / "run/last"
    runs.train(spec, output=tmp_path / "run", observer=QUIET)
    whole = [(last / name).read_bytes() for name in ("interventions.safetensors", "training.safetensors")]
    runs.train(spec, output=tmp_path / "run", observer=QUIET, resume="2")
    assert [(last / name).read_bytes() for name in ("interventions.safetensors", "training.safetensors")] == whole
