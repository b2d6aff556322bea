"""`reft runs`: lists, shows and compares what stands in run folders."""

import json
import re

import pytest
import yaml

from reft_cli.runfolder import RunFolder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs in ./runs: a (LoReFT, two checkpoints, evaluated) and b (DiReFT, failed before the first)."""
    monkeypatch.chdir(tmp_path)
    make("a", method="loreft", rank=4, scores=[(10, 0.5), (20, 0.9)])
    make("b", method="direft", rank=8, scores=[], status="failed")
    return tmp_path / "runs"


def make(name, *, method, rank, scores, status="done"):
    run = RunFolder.create(f"runs/{name}")
    run.begin(command=["reft", "train", "spec.yaml"], facts={"devices": ["cpu"], "data": {"train": {"used": 7}}})
    spec = {"model": {"name": "org/model"}, "intervention": {"method": method, "rank": rank}, "train": {"epochs": 3}}
    run.write_spec("model: org/model\n", resolved=yaml.safe_dump(spec))
    for step, score in scores:
        run.checkpoint(step).mkdir()
        (run.checkpoint(step) / "reft.json").write_text("{}")
        run.append_metrics({"step": step, "loss": 1.0})
        run.append_metrics({"step": step, "validation_exact_match": score, "validation_loss": 1 - score})
        run.link("best", run.checkpoint(step))
    if scores:
        run.evaluation("test").write_text(json.dumps({"metrics": {"exact_match": 0.85}}))
    run.finish(status, exit_code=0 if status == "done" else 6, reason=status)
    return run


def test_a_list_of_runs(reft, runs):
    lines = reft("runs", "ls").out.splitlines()
    assert lines[0].split() == ["run", "status", "step", "exact_match", "loss", "method", "model", "started", "seconds"]
    assert lines[1].split()[:7] == ["runs/a", "done", "20", "0.9", "0.1", "loreft", "org/model"]
    assert lines[2].split()[:4] == ["runs/b", "failed", "direft", "org/model"]
    assert len(lines) == 3 and re.search(r"org/model  \d{4}-\d\d-\d\d \d\d:\d\d +\d+$", lines[1])


def test_a_list_as_json(reft, runs):
    first, second = reft("runs", "ls", "--json").json
    assert first["run"] == "runs/a" and first["scores"]["exact_match"] == 0.9 and first["step"] == 20
    assert second["scores"] == {} and second["step"] is None


def test_runs_are_sorted_with_the_best_first(reft, runs):
    make("c", method="red", rank=None, scores=[(5, 0.95)])
    by = {
        key: [row["run"][-1] for row in reft("runs", "ls", "--sort", key, "--json").json]
        for key in ("exact_match", "loss", "run")
    }
    assert by == {"exact_match": ["c", "a", "b"], "loss": ["c", "a", "b"], "run": ["a", "b", "c"]}


def test_an_unknown_sort_key_lists_the_known(reft, runs):
    done = reft("runs", "ls", "--sort", "bleu")
    assert done.code == 2 and "--sort bleu: no run has it" in done.err and "exact_match" in done.err


def test_no_runs(reft, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = reft("runs", "ls")
    assert done.code == 2 and done.err.startswith("runs does not exist")
    (tmp_path / "runs").mkdir()
    assert reft("runs", "ls", "--json").json == []
    done = reft("runs", "ls")
    assert (done.code, done.out, done.err) == (0, "", "no runs in runs\n")
    assert reft("runs", "ls", ".").err == "no runs in .; see reft runs ls runs\n"


def test_a_run_in_full(reft, runs):
    out = reft("runs", "show", "runs/a").out
    for piece in (
        "step_000010, step_000020",
        "validation exact_match",
        "0.9",
        "test exact_match",
        "0.85",
        "data.train.used",
        "cpu",
    ):
        assert piece in out, piece
    assert reft("runs", "show", "runs/a/best").out == out


def test_a_runs_command_can_be_given_again(reft, runs):
    run = RunFolder(runs / "a")
    run.begin(command=["/bin/__main__.py", "train", "my spec.yaml"], facts={})
    run.release()
    assert "reft train 'my spec.yaml'\n" in reft("runs", "show", "runs/a").out


def test_a_run_in_full_as_json(reft, runs):
    found = reft("runs", "show", "runs/a", "--json").json
    assert found["spec"]["intervention"] == {"method": "loreft", "rank": 4}
    assert found["evaluations"]["test"]["metrics"]["exact_match"] == 0.85
    assert found["record"]["status"] == "done"


def test_a_run_that_is_not_there(reft, runs):
    done = reft("runs", "show", "runs/z", "--json")
    assert done.code == 4 and done.error["kind"] == "checkpoint"


def test_what_two_runs_differ_in(reft, runs):
    lines = [line.split() for line in reft("runs", "diff", "runs/a", "runs/b").out.splitlines()]
    assert lines[0] == ["runs/a", "runs/b"]
    assert ["intervention.method", "loreft", "direft"] in lines and ["intervention.rank", "4", "8"] in lines
    assert ["test", "exact_match", "0.85"] in lines
    assert not any(line[0] == "train.epochs" for line in lines)


def test_differences_as_json(reft, runs):
    found = reft("runs", "diff", "runs/a", "runs/b", "--json").json
    assert found["spec"] == {"intervention.method": ["loreft", "direft"], "intervention.rank": [4, 8]}
    assert found["scores"]["validation exact_match"] == [0.9, None]


def test_texts_that_differ_in_blanks_can_be_told_apart(reft, runs):
    for name, template, stop in (("a", " {label}", ["\n"]), ("b", "{label}", [])):
        spec = {
            "data": {"template": {"completion": template}, "test": [{"path": "x.jsonl"}]},
            "generation": {"stop": stop},
        }
        (runs / name / "resolved.yaml").write_text(yaml.safe_dump(spec))
    lines = [line.split(maxsplit=1) for line in reft("runs", "diff", "runs/a", "runs/b").out.splitlines()]
    assert ["data.template.completion", '" {label}"  {label}'] in lines
    assert ["generation.stop", '["\\n"]      []'] in lines


def test_equal_runs_have_no_result(reft, runs):
    done = reft("runs", "diff", "runs/a", "runs/a")
    assert done.out == "" and "same spec" in done.err


def test_a_run_that_ended_before_its_spec_was_written(reft, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunFolder.create("runs/early")
    run.begin(command=["reft"], facts={})
    run.release()
    assert reft("runs", "ls", "--json").json[0]["status"] == "killed"


def test_a_damaged_spec_is_an_error_in_words(reft, runs):
    (runs / "a" / "resolved.yaml").write_text("{")
    done = reft("runs", "show", "runs/a")
    assert done.code == 4 and "resolved.yaml: damaged" in done.err
