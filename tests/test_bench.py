"""The parts of scripts/bench/train.py and glue.py that say what was measured: the plan, the floor and the tables."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "train.py"


def imported(script: Path) -> ModuleType:
    name = f"bench_{script.stem}"
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec is not None and spec.loader is not None
    sys.path.insert(0, str(script.parent))  # as when it is run
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return imported(SCRIPT)


@pytest.fixture(scope="module")
def glue() -> ModuleType:
    return imported(SCRIPT.with_name("glue.py"))


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


def line(side: str, seed: int, score: float, **more: object) -> dict[str, object]:
    settings = {"rows": 2000, "epochs": 10.0, "set": ["intervention.rank=4"]}
    return {"side": side, "task": "rte", "seed": seed, "settings": settings, "score": score, "seconds": 20.0, **more}


@pytest.mark.parametrize(("ours", "verdict"), [(0.59, "yes"), (0.57, "no"), (0.9, "yes")])
def test_glue_compares_means_with_the_spread_of_the_peer(glue: ModuleType, ours: float, verdict: str):
    lines = [line("reft", seed, ours) for seed in (1, 2)]
    lines += [line("pyreft", 1, 0.58), line("pyreft", 2, 0.62), line("pyreft", 3, 0.0, error="killed")]
    title, _, _, _, row, *_ = glue.table([*lines, line("reft", 2, ours)]).splitlines()  # made twice, counted once
    assert title == "2000 rows, 10 epochs, intervention.rank=4"
    assert row == (
        f"| rte | 2, 2 | {ours:.3f} ± 0.000 | 0.600 ± 0.028 | {ours - 0.6:+.3f} | 0.580 to 0.620 "
        f"| {ours:.3f} to {ours:.3f} | {verdict} | 20, 20 |"
    )


def test_glue_reads_the_lines_that_are_whole(glue: ModuleType, tmp_path: Path):
    results = tmp_path / "results.jsonl"
    assert glue.lines_of(results) == []
    results.write_text(json.dumps(line("reft", 1, 0.5)) + '\n{"side": "re')
    assert [glue.key_of(each)[:3] for each in glue.lines_of(results)] == [("reft", "rte", 1)]
    results.write_text('{"text": "x", "label": 1}\n')
    assert glue.columns_of(results) == {"text": "text"}
    results.write_text('{"sentence1": "x", "sentence2": "y", "label": 1}\n')
    assert glue.columns_of(results) == {"text": "sentence1", "text_pair": "sentence2"}
    results.write_text('{"premise": "x", "hypothesis": "y", "label": 1}\n')
    assert glue.columns_of(results) == {}


def test_glue_tells_of_a_worker_that_ends(glue: ModuleType, tmp_path: Path):
    asked = Namespace(peer_python=sys.executable, peer_path=None, timeout=60.0)
    worker = glue.Worker("pyreft", asked)
    found = worker.run(tmp_path / "no_such_plan.json")
    worker.close()
    assert "No such file" in found["error"] and found["stderr"]


COMMON = {"device": "H200", "commit": {"commit": "a" * 40, "dirty": False}}


def test_the_table_of_processes_has_ratios_and_failures():
    parallel = imported(SCRIPT.with_name("parallel.py"))
    row = {
        "processes": 1,
        "seconds": 0.06,
        "tokens_a_second": 1000,
        "gradients_alone": 0.001,
        "gradients_within": 0.002,
    }
    row |= {"sharded": False, "peak_gib": 2.5, "loss": 9.3}
    facts = COMMON | {"mix": "alpaca", "rows": 64, "positions": "f7+l7", "rank": 8, "layers": "all", "steps": 4}
    shapes = {
        "1b": [row, row | {"processes": 2, "tokens_a_second": 1900, "sharded": True}, {"processes": 4, "error": "a|b"}]
    }
    assert parallel.table(facts | {"warmup": 1, "shapes": shapes}).splitlines()[4:] == [
        "| 1b | 1 | 0.0600 | 1,000 | 1.00 | 1.00, 2.00 | 2.5 | 9.3 |",
        "| 1b, sharded | 2 | 0.0600 | 1,900 | 1.90 | 1.00, 2.00 | 2.5 | 9.3 |",
        "| 1b | 4 | failed: a/b | | | | | |",
    ]


def test_cases_of_memory_are_read_and_shown():
    memory = imported(SCRIPT.with_name("memory.py"))
    assert memory.Case.of("3;9:f5+l5:4096:again") == memory.Case("3;9", "f5+l5", 4096, True)
    case = {"layers": "all", "positions": "f7+l7", "pass_tokens": 4000, "checkpointing": True, "checked_gib": None}
    case |= {"trained_predicted_gib": 2.0, "trained_gib": 2.1, "chosen_predicted_gib": 1.0, "chosen_gib": None}
    form = {"form": "whole", "file_gib": 2.0, "load_peak_gib": 2.0, "base_gib": 2.0, "load_host_gib": 0.0}
    facts = COMMON | {"shape": "1b", "rows": 32, "mix": "alpaca", "rank": 8}
    forms = [form | {"load_seconds": 1.0, "cases": [case]}, {"form": "nf4", "error": "not there"}]
    assert memory.table(facts | {"forms": forms}).splitlines()[4:] == [
        "| whole | 2.00 | 2.00, 2.00, 0.00, 1.0 | all, f7+l7, 4,000, checkpointed | 2.00 "
        "| – | 2.10 | – | 1.00 | – | – |",
        "| nf4 | failed: not there | | | | | | | | | |",
    ]


def test_the_table_of_kills_says_whether_bits_are_the_same():
    faults = imported(SCRIPT.with_name("faults.py"))
    same = {"bitwise": True, "largest": 0.0, "of_what_moved": 0.0, "loss": 0.0}
    far = {"bitwise": False, "largest": 1e-4, "of_what_moved": 1e-3, "loss": 0.01}
    mode = {"mode": "plain", "again": same, "resumed": far, "faults": [{"signal": "SIGKILL", "reached": 7}]}
    found = COMMON | {"spec": "s.yaml", "steps": 9, "modes": [mode, {"mode": "deterministic", "error": "exit code 5"}]}
    assert faults.table(found).splitlines()[4:] == [
        "| plain | made again | yes | 0.0e+00 | 0.0e+00 | 0.0e+00 |",
        "| plain | killed and resumed: SIGKILL at 7 | no | 1.0e-04 | 1.0e-03 | 1.0e-02 |",
        "| deterministic | failed: exit code 5 | | | | |",
    ]
