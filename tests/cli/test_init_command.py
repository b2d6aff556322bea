"""`reft init` and `reft schema`: specs that load as they are written, with comments from the schema."""

import json
from pathlib import Path

import pytest

from reft_cli.cli.init import Task
from reft_cli.kinds import PAIRED
from reft_cli.runs.sources import rows_of
from reft_cli.spec import json_schema, load_spec

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("task", [task.value for task in Task])
def test_what_is_written_loads_and_its_data_are_there(reft, task):
    done = reft("init", task)
    assert (done.code, done.out) == (0, "spec.yaml\n")
    spec = load_spec(Path("spec.yaml")).spec
    assert spec.task.kind == task and spec.model.name == "bundled:tiny-llama"
    for split in ("train", "validation", "test"):
        rows = rows_of(spec, split)
        assert len(rows) >= 100
        if task == "regression":
            assert {row["label"] for row in rows.rows} == {0.0, 1.0}
        if task in PAIRED:
            assert {(row["chosen"], row["rejected"]) for row in rows.rows} == {
                (" positive", " negative"),
                (" negative", " positive"),
            }


def test_every_key_has_a_comment_and_the_editor_its_schema(reft):
    reft("init")
    lines = Path("spec.yaml").read_text().splitlines()
    assert lines[0] == "# yaml-language-server: $schema=reft.schema.json"
    assert json.loads(Path("reft.schema.json").read_text()) == json_schema()
    keys = [index for index, line in enumerate(lines) if line.strip() and not line.strip().startswith("#")]
    assert len(keys) >= 15
    assert all(lines[index - 1].strip().startswith("# ") for index in keys)
    assert all(len(line) <= 120 for line in lines)
    assert "One of loreft, noreft, direft" in " ".join(line.strip("# ") for line in lines)


@pytest.mark.parametrize(("task", "config"), [("causal_lm", "quickstart"), ("classification", "classification")])
def test_the_bundled_model_is_trained_as_it_was_found_to_need(reft, task, config):
    reft("init", task)
    ours, proven = load_spec(Path("spec.yaml")).spec, load_spec(CONFIGS / f"{config}.yaml").spec
    assert (ours.train, ours.intervention) == (proven.train, proven.intervention)


def test_another_model_and_file(reft):
    assert reft("init", "--model", "org/a: b", "-o", "sub/mine.yaml").out == "sub/mine.yaml\n"
    spec = load_spec(Path("sub/mine.yaml")).spec
    assert spec.model.name == "org/a: b"
    assert (spec.intervention.positions, spec.train.learning_rate) == ("f7+l7", 9e-4)  # the paper's, for large models
    assert Path("sub/reft.schema.json").is_file()


def test_a_file_in_the_way_stays(reft):
    Path("spec.yaml").write_text("mine")
    done = reft("init")
    assert done.code == 2 and done.err == "spec.yaml exists; replace it with --force, or write another file with -o\n"
    assert Path("spec.yaml").read_text() == "mine" and not Path("reft.schema.json").exists()
    assert reft("init", "--force").code == 0
    assert Path("spec.yaml").read_text() != "mine"


def test_a_second_spec_beside_the_first(reft):
    assert reft("init").code == reft("init", "classification", "-o", "b.yaml").code == 0


def test_a_place_that_cannot_be_written(reft):
    Path("file").write_text("")
    done = reft("init", "-o", "file/spec.yaml")
    assert done.code == 2 and "file/spec.yaml: cannot be written" in done.err


def test_an_unknown_task(reft):
    done = reft("init", "translation")
    assert done.code == 2 and "causal_lm" in done.err


def test_the_schema(reft):
    done = reft("schema")
    assert done.code == 0 and json.loads(done.out) == json_schema()
    assert reft("schema", "--json").json == json_schema()


def test_the_files_as_json(reft):
    assert reft("init", "--json").json == {"spec": "spec.yaml", "files": ["spec.yaml", "reft.schema.json"]}
