"""`reft tasks`: the list, one suite as YAML or JSON, and what it says to a slip of the pen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reft_cli.spec.load import load_spec
from reft_cli.suites import SUITES


def test_the_list(reft):
    done = reft("tasks")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].split() == ["suite", "metric", "recipes", "what", "it", "is"]
    assert [line.split()[0] for line in lines[1:]] == list(SUITES)
    assert "next: task: NAME" in done.err
    found = reft("tasks", "--json").json
    assert [each["suite"] for each in found] == list(SUITES)
    assert found[-1]["metric"] == "pearson" and found[-1]["kind"] == "regression"


def test_a_suite_as_yaml_is_a_spec(reft, tmp_path: Path):
    done = reft("tasks", "show", "glue/rte", "--method", "direft", "--recipe", "large")
    assert done.code == 0 and done.err == ""
    assert done.out.startswith("# glue/rte: a pair of texts: entailment, not_entailment\n# recipe large for direft;")
    assert "the published weight decay of 0.006 reached the head only" in done.out
    path = tmp_path / "copied.yaml"
    path.write_text(done.out)
    spec = load_spec(path).spec
    assert (spec.model.name, spec.task.suite, spec.train.epochs) == ("FacebookAI/roberta-large", None, 30)


def test_a_suite_as_json(reft):
    found = reft("tasks", "show", "commonsense", "--json").json
    assert found["recipe"] == "paper" and "greedy" in found["notes"][0]
    rank = next(each for each in found["defaults"] if each["key"] == "intervention.rank")
    assert rank == {"key": "intervention.rank", "value": 8, "source": "pyreft's README"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["glue/sst"], "`glue/sst` is no suite; `reft tasks` lists them; did you mean `glue/sst2`?"),
        (["instruct", "--method", "lora"], "--method lora: write loreft, noreft, direft, "),
        (
            ["instruct", "--recipe", "big"],
            "--recipe big: instruct has no such recipe for loreft; write paper, half or",
        ),
        (
            ["commonsense", "--method", "red", "--recipe", "paper"],
            "--recipe paper: commonsense has no such recipe for red; there is none; leave it out",
        ),
    ],
)
def test_what_there_is_not(reft, words: list[str], message: str):
    done = reft("tasks", "show", *words)
    assert done.code == 2 and done.out == ""
    assert done.err.startswith(message)


def test_check_says_what_the_suite_brought(reft, tmp_path: Path, monkeypatch, tiny_llama):
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"true or false: {n}?", "input": "", "answer": "true"} for n in range(6)]
    for split in ("train", "test"):
        path = Path("dataset/boolq") / f"{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))
    Path("s.yaml").write_text(
        f"model: {tiny_llama}\ntask: commonsense/boolq\ndata: {{folder: dataset}}\ntrain: {{epochs: 1}}\n"
        "intervention: {positions: f2+l2}\n"
    )
    done = reft("check", "s.yaml")
    assert done.code == 0
    told = (" ".join(line.split()) for line in done.out.splitlines())
    lines = [line for line in told if line.startswith(("suite ", "not of it ", "note "))]
    assert lines[0].startswith("suite commonsense/boolq, recipe paper: task.kind, task.metric, task.extraction, ")
    assert "train.learning_rate" in lines[0] and "train.epochs" not in lines[0]
    assert lines[1] == "not of it intervention.positions, train.epochs"
    assert lines[2].startswith("note the paper never trains on boolq alone")
    found = reft("check", "s.yaml", "--json").json["suite"]
    assert (found["name"], found["recipe"]) == ("commonsense/boolq", "paper")
    assert found["replaced"] == ["intervention.positions", "train.epochs"]
