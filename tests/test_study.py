"""scripts/bench/study.py: which runs it makes, what they learn from and are scored on, and what its table says."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from reft_cli.runs.sources import rows_of
from reft_cli.spec import load_spec

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "study.py"
FLAGS = {
    "task": ["sst2"],
    "answer": ["text"],
    "method": ["loreft"],
    "positions": ["prompt"],
    "init": ["paper"],
    "rank": [4],
    "layers": ["all"],
    "rate": [5e-3],
    "epochs": [2.0],
    "warmup": [0.0],
    "seed": [0],
    "rows": 24,
    "set": [],
}


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_study", SCRIPT)
    assert spec is not None and spec.loader is not None
    sys.path.insert(0, str(SCRIPT.parent))  # as when it is run
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_study"] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path: Path, study: ModuleType) -> str:
    """Forty training rows and ten validation rows with every column that a task reads."""
    for task in study.TASKS.values():
        for split, count in (("train", 40), ("validation", 10)):
            path = tmp_path / f"{task.path}.{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            rows = [{"label": row % 2, "label_name": ("bad", "good")[row % 2], "row": row} for row in range(count)]
            for row in rows:
                row |= {"answer": row["label_name"]} | dict.fromkeys(
                    ("sentence1", "sentence2") if "sentence1" in task.prompt else ("text",),
                    f"a {row['label_name']} one",
                )
                row |= {"instruction": row.pop("text")} if "instruction" in task.prompt else {}
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


def plan(study: ModuleType, **flags: object) -> list:
    return study.plan(Namespace(**FLAGS | flags))


def test_settings_that_a_method_does_not_have_make_no_runs(study: ModuleType):
    both = {"positions": ["prompt", "all"], "init": ["paper", "identity"], "rank": [1, 4], "seed": [0, 1]}
    assert len(plan(study, **both)) == 16
    assert len(plan(study, method=["red"], **both)) == 4
    assert len(plan(study, method=["lora"], **both)) == 4
    assert len(plan(study, method=["probe", "frozen", "majority"], **both)) == 3
    assert [each.method for each in plan(study, method=["lora", "frozen", "probe"], answer=["head"])] == ["probe"]


@pytest.mark.parametrize("answer", ["text", "head"])
def test_no_row_is_both_learned_from_and_chosen_on(study: ModuleType, data: str, tmp_path: Path, answer: str):
    for config in plan(study, task=list(study.TASKS), answer=[answer]):
        path = tmp_path / "study.yaml"
        path.write_text(json.dumps(study.spec_of(config, data=data, model="bundled:tiny-llama")))
        spec = load_spec(path).spec
        learned, scored = rows_of(spec, "train"), rows_of(spec, "test")
        assert [row["row"] for row in learned.rows] == list(range(24))
        assert [row["row"] for row in scored.rows] == [*range(24, 40), *range(10)]
        assert list(scored.sources) == ["choice"] * 16 + ["score"] * 10


def test_a_fifth_of_the_rows_is_left_to_choose_on(study: ModuleType, data: str):
    spec = study.spec_of(plan(study, rows=100)[0], data=data, model="m")
    assert spec["data"]["train"]["split"] == "train[:32]" and spec["data"]["test"][0]["split"] == "train[32:1032]"


def test_runs_have_both_scores_and_are_not_made_again(study: ModuleType, data: str):
    for method, answer in (
        ("loreft", "text"),
        ("red", "head"),
        ("frozen", "text"),
        ("probe", "text"),
        ("majority", "text"),
    ):
        [config] = plan(study, method=[method], answer=[answer], epochs=[1.0])
        result = json.loads(json.dumps(study.run(config, data=data, model="bundled:tiny-llama")))
        assert 0 <= result["choice"] <= 1 and 0 <= result["score"] <= 1, result
        assert study.key_of(result) == config.key
    assert result["score"] == 0.5  # of the majority


def test_what_reft_refuses_is_a_result(study: ModuleType, data: str):
    [config] = plan(study, layers=["9"])
    assert "layer 9 does not exist" in study.run(config, data=data, model="bundled:tiny-llama")["error"]


def line(**values: object) -> dict:
    names = ("task", "answer", "method", "positions", "init", "rank", "layers", "rate", "epochs", "warmup", "seed")
    return {name: FLAGS[name][0] for name in names} | {"rows": 1500, "sets": [], "trainable": 12312} | values


def test_the_table_is_led_by_what_was_best_on_choice(study: ModuleType, tmp_path: Path):
    results = [
        line(seed=0, choice=0.7, score=0.6),
        line(seed=1, choice=0.6, score=0.7),
        line(rate=1e-2, choice=0.6, score=0.9),
        line(rate=1e-1, error="loss is NaN"),
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in results) + '{"task": "ss')
    assert study.read(path) == results
    _, _, *rows = study.table(results, best=False).splitlines()
    what = "positions prompt, init paper, layers all, rank 4, rate {}, epochs 2.0, 1,500 rows"
    assert rows == [
        f"| sst2 | text | loreft | 12,312 | {what.format(0.005)} | 2 | 0.650 ± 0.071 | 0.650 ± 0.071 |",
        f"| sst2 | text | loreft | 12,312 | {what.format(0.01)} | 1 | 0.600 | 0.900 |",
        f"| sst2 | text | loreft | – | {what.format(0.1)} | 1 | failed | |",
    ]
    assert study.table(results, best=True).splitlines()[2:] == rows[:1]
