"""A base that is spread over two processes trains to the numbers and the checkpoint of a whole one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from processes import run_as
from reft_cli import runs
from reft_cli.errors import SpecError
from reft_cli.models.sharding import is_sharded, shard_blocks
from reft_cli.parallel.collective import joined, rank
from reft_cli.training.observer import NullObserver
from test_parallel_runs import numbers, train_as, weights
from tiny_models import base_of


def logits_of_both(family: str) -> dict[str, Any]:
    """Whether a whole and a sharded model agree, and what of it lies here."""
    with joined(device="cpu"):
        whole = base_of(family).model
        ids = torch.arange(9)[None] + rank()
        sharded = copy.deepcopy(whole)
        shard_blocks(sharded, torch.device("cpu"))
        local = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in sharded.parameters())
        return {
            "equal": torch.equal(whole(input_ids=ids).logits, sharded(input_ids=ids).logits),
            "sharded": (is_sharded(whole), is_sharded(sharded)),
            "part": local / sum(p.numel() for p in whole.parameters()),
        }


def test_a_sharded_model_computes_the_same_and_holds_less():
    for found in run_as(logits_of_both, "llama"):
        assert found["equal"] and found["sharded"] == (False, True)
        assert found["part"] < 0.9  # a tiny model's embeddings are most of it, and stay whole


@pytest.mark.parametrize(
    "sets",
    [
        ("train.micro_batch_size=1", "train.gradient_checkpointing=true"),
        ("task.kind=classification", "data.template=null", "task.metric=null", "train.global_batch_size=1"),
    ],
    ids=["uneven passes", "head"],
)
def test_it_trains_like_a_whole_one(spec_file: Path, tmp_path: Path, sets: tuple[str, ...]):
    sets = (*sets, "train.max_steps=4", "evaluation.every=2")
    (alone,) = train_as(1, spec_file, tmp_path / "one", *sets)
    first, second = train_as(2, spec_file, tmp_path / "two", *sets, "parallel.shard=true")
    torch.testing.assert_close(numbers(first["gradients"]), numbers(alone["gradients"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first["metrics"], alone["metrics"], rtol=1e-4, atol=1e-5)
    assert second["gradients"] == first["gradients"] and second["metrics"] == first["metrics"]
    found, wanted = weights(tmp_path / "two"), weights(tmp_path / "one")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)
    (resumed,) = train_as(1, spec_file, tmp_path / "two", *sets, "train.max_steps=6", resume="last")
    assert resumed["reason"] == "finished"  # by one process, with a whole base


def test_one_process_has_nothing_to_spread(make_spec, tmp_path: Path):
    with pytest.raises(SpecError) as caught:
        runs.train(make_spec("parallel.shard=true"), output=tmp_path / "run", observer=NullObserver())
    said = "parallel.shard: there is one process, so nothing to spread the base over; leave it out"
    assert str(caught.value) == said and not (tmp_path / "run").exists()


def test_a_float8_base_is_not_sharded(make_spec):
    with pytest.raises(SpecError, match=r"parallel\.shard: a base in float8 cannot be sharded; leave out one of them"):
        make_spec("parallel.shard=true", "model.quantization=float8")
