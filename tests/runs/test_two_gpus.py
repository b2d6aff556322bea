"""Two GPUs: the numbers of one, for every layout and type. Skipped where there are fewer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from processes import run_as
from reft_cli import runs
from reft_cli.runfolder import RunFolder
from reft_cli.spec.load import load_spec
from reft_cli.training.observer import NullObserver
from test_parallel_runs import Watching, numbers, train_here, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def train_on(count: int, spec: Path, run: Path, *sets: str) -> list[dict]:
    return run_as(train_here, spec, ("model.device=cuda", *sets), run, {}, Watching(), count=count)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_two_gpus_train_like_one(spec_file: Path, tmp_path: Path, layout: str):
    sets = ("model.dtype=float32", f"train.layout={layout}", "train.deterministic=true")
    (alone,) = train_on(1, spec_file, tmp_path / "one", *sets)
    first, second = train_on(2, spec_file, tmp_path / "two", *sets)
    torch.testing.assert_close(numbers(first["gradients"]), numbers(alone["gradients"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first["steps"], alone["steps"], rtol=1e-4, atol=1e-5)
    assert second["gradients"] == first["gradients"]
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-3, atol=1e-4)
    record = RunFolder(tmp_path / "two").read()
    assert record["processes"] == 2 and len(record["devices"]) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_learn_on_two_gpus(spec_file: Path, tmp_path: Path, dtype: str):
    found = train_on(2, spec_file, tmp_path / "run", f"model.dtype={dtype}", "train.epochs=6")
    assert found[0]["steps"][-1][1] < found[0]["steps"][0][1] - 0.1


def test_a_base_sharded_over_two_gpus_trains_like_a_whole_one(spec_file: Path, tmp_path: Path):
    sets = ("model.dtype=float32", "train.deterministic=true")
    (alone,) = train_on(1, spec_file, tmp_path / "one", *sets)
    first, second = train_on(2, spec_file, tmp_path / "two", *sets, "parallel.shard=true")
    torch.testing.assert_close(numbers(first["gradients"]), numbers(alone["gradients"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first["metrics"], alone["metrics"], rtol=1e-3, atol=1e-4)
    assert second["gradients"] == first["gradients"]
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-3, atol=1e-4)
    report = runs.evaluate(
        tmp_path / "two", place=runs.BasePlace(device="cuda"), observer=NullObserver()
    )  # by one process, with a whole base
    assert report.rows == 7


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_learn_on_a_sharded_base(spec_file: Path, tmp_path: Path, dtype: str):
    found = train_on(2, spec_file, tmp_path / "run", f"model.dtype={dtype}", "train.epochs=6", "parallel.shard=true")
    assert found[0]["steps"][-1][1] < found[0]["steps"][0][1] - 0.1


@pytest.mark.parametrize("memory", [{"0": "14MB", "1": "40MB"}, {"0": "14MB", "cpu": "1GB"}], ids=["gpus", "offloaded"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_base_laid_out_over_devices_trains_like_one_on_one(tmp_path: Path, layout: str, memory: dict[str, str]):
    config = Path(__file__).parents[2] / "configs/debug/tiny.yaml"
    sets = ["model.device=cuda", "model.dtype=float32", "parallel.processes=1", f"train.layout={layout}"]
    sets += ["train.gradient_checkpointing=true", "train.deterministic=true", "train.max_steps=4"]
    spread = ["model.device_map=auto", *(f"model.max_memory.{name}={size}" for name, size in memory.items())]
    for name, given in (("whole", sets), ("spread", [*sets, *spread])):
        runs.train(load_spec(config, overrides=given), output=tmp_path / name, observer=NullObserver())
    places = RunFolder(tmp_path / "spread").read()["places"]
    assert set(places) == {"cuda:0", "cuda:1" if "1" in memory else "cpu"}
    torch.testing.assert_close(weights(tmp_path / "spread"), weights(tmp_path / "whole"), rtol=1e-3, atol=1e-4)
    with runs.open_run(tmp_path / "spread", place=runs.BasePlace(device_map="auto", max_memory=memory)) as session:
        answers = session.answer(["The film was bad.", "I loved it."], settings={"max_new_tokens": 3})
    with runs.open_run(tmp_path / "spread", place=runs.BasePlace(device="cuda")) as session:
        assert [each.text for each in answers] == [
            each.text for each in session.answer(["The film was bad.", "I loved it."], settings={"max_new_tokens": 3})
        ]
