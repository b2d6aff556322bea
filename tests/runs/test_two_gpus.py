"""Two GPUs: the numbers of one, for every layout and type. Skipped where there are fewer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from processes import run_as
from reft_cli import runs
from reft_cli.runfolder import RunFolder
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
        tmp_path / "two", device="cuda", observer=NullObserver()
    )  # by one process, with a whole base
    assert report.rows == 7


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_learn_on_a_sharded_base(spec_file: Path, tmp_path: Path, dtype: str):
    found = train_on(2, spec_file, tmp_path / "run", f"model.dtype={dtype}", "train.epochs=6", "parallel.shard=true")
    assert found[0]["steps"][-1][1] < found[0]["steps"][0][1] - 0.1
