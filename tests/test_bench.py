"""The parts of scripts/bench/train.py that say what was measured: the plan, the floor and the table."""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "train.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_train", SCRIPT)
    assert spec is not None and spec.loader is not None
    sys.path.insert(0, str(SCRIPT.parent))  # as when it is run
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_train"] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    return module


def plan(bench: ModuleType, *, layers: str = "all", positions: str = "f7+l7"):
    return bench.Plan("8b", "commonsense", "cpu", positions, layers, 8, 16_384)


def test_layers_and_positions_are_read(bench: ModuleType):
    assert plan(bench).chosen == list(range(32)) and plan(bench, layers="3;9;18;24").chosen == [3, 9, 18, 24]
    assert plan(bench, positions="f5+l12").ends == (5, 12)
    with pytest.raises(ValueError, match="the peers know"):
        _ = plan(bench, positions="all").ends


def test_every_side_gets_the_same_rows(bench: ModuleType):
    rows = bench.draw("alpaca", 1000, 2)
    assert rows == bench.draw("alpaca", 1000, 2) and [len(batch) for batch in rows] == [32, 32]
    assert all(60 <= prompt <= 400 and 20 <= len(tokens) - prompt <= 400 for batch in rows for tokens, prompt in batch)


def test_the_floor_skips_what_lies_below_the_lowest_edited_layer(bench: ModuleType):
    whole = bench.floor(plan(bench), 790e12)
    assert whole == pytest.approx(0.144, abs=0.003)  # 4 operations × 6.98e9 weights × 4,038 tokens
    assert bench.floor(plan(bench, layers="8;31"), 790e12) / whole == pytest.approx((2 * 32 - 8) / (2 * 32))


def test_the_table_has_a_line_for_each_side_that_failed_too(bench: ModuleType):
    numbers = {"fastest": 0.1, "slowest": 0.3, "first": 1.0, "host_gib": 2.04, "loss": 8.3}
    ours = {
        "side": "reft",
        "seconds": 0.2,
        "peak_gib": 6.3,
        "versions": {"torch": "2.11.0", "numpy": "2.5.2"},
        **numbers,
    }
    lora = {"side": "lora", "seconds": 0.5, "peak_gib": None, "versions": {"peft": "0.21"}, **numbers}
    facts = {"shape": "1b", "mix": "alpaca", "positions": "f7+l7", "layers": "all", "rank": 8, "steps": 20, "warmup": 6}
    text = bench.table(
        facts
        | {"rows": 32, "tokens": 4000.0, "device": "H200", "floor": 0.02, "commit": {"commit": "a" * 40, "dirty": True}}
        | {"sides": [ours, lora, {"side": "adapters", "error": "out | of memory", "stderr": []}]}
    )
    head, rest = text.split("\n\n")
    assert head == (
        "1b shape, alpaca rows (32 a step, 4,000 tokens), f7+l7 tied, rank 8, layers all; H200; 20 steps after 6; "
        "commit aaaaaaaa and changes."
    )
    assert rest.splitlines()[2:] == [
        "| arithmetic floor | 0.0200 | 0.10 | 200,000 | | | | |",
        "| reft | 0.2000 | 1.00 | 20,000 | 6.3 | 2.0 | 8.3 | torch 2.11.0 |",
        "| lora | 0.5000 | 2.50 | 8,000 | – | 2.0 | 8.3 | peft 0.21 |",
        "| adapters | failed | | | | | | out / of memory |",
    ]


def test_a_side_that_cannot_start_is_a_result(bench: ModuleType, tmp_path: Path):
    asked = Namespace(
        shape="tiny", mix="alpaca", positions="f7+l7", layers="all", rank=8, steps=1, warmup=0, timeout=60.0, budget=64
    )
    asked.peer_python, asked.peer_path, asked.profile = str(tmp_path / "python"), None, None
    found = bench.run_side("pyreft", asked)
    assert found["side"] == "pyreft" and "No such file or directory" in found["error"]
