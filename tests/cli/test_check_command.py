"""`reft check`: the report of a real spec, and how a row is shown in a pipe and on a terminal."""

import json
import sys
from pathlib import Path

import pytest

from reft_cli.cli.check import marked, painted
from reft_cli.data.report import Token

ROW = [
    Token("Good", True, False, ("f1+l1",)),
    Token(" film", True, False, ()),
    Token("\nIs", True, False, ("f1+l1",)),
    Token(" it", False, True, ()),
    Token("!", False, True, ()),
]


@pytest.fixture
def spec(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"say {word}: ", "completion": word} for word in ("one", "two", "three", "four", "five")]
    rows.append({"prompt": "x", "completion": "short"})
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("s.yaml").write_text(
        f"model: {tiny_llama}\n"
        "intervention: {positions: f2+l2, rank: 2}\n"
        "data: {train: train.jsonl, test: train.jsonl}\n"
        "train: {global_batch_size: 2}\n"
    )
    return "s.yaml"


def test_a_row_in_a_pipe_has_marks():
    assert marked(ROW) == r"[f1+l1]Good[/] film[f1+l1]\nIs[/][answer] it![/]"


def test_an_edited_answer_has_both_marks():
    assert marked([Token("a", False, True, ("all",))]) == "[all answer]a[/]"


def test_a_row_on_a_terminal_has_colours():
    text = painted(ROW)
    assert text.plain == "Good film\nIs it!"
    assert [str(span.style) for span in text.spans] == ["dim underline", "dim", "dim underline", "green", "green"]


def test_the_report(reft, spec):
    done = reft("check", spec)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == "spec          s.yaml: ok"
    assert lines[-1] == "next: reft train s.yaml"
    for piece in (
        "trainable     390 (",
        "3 sites × 130 (width 32, rank 2)",
        "steps         9 (3 an epoch)",
        "layout        packed",
        "compiled      no: it pays on a GPU only; train.compile: on does it here",
        "CUDA graphs   no: there are no CUDA graphs on cpu",
        "frozen cache  no: only 1 of 3 blocks lie below the lowest edit",
        "shared head   no: rows of a pass have no head of 16 tokens or more in common",
        "memory        about",
    ):
        assert piece in done.out, piece
    assert r"[f2+l2]sa[/]y one[f2+l2]: [/][answer]one<eos>[/]" in done.out
    split = next(line.split() for line in lines if line.startswith("train "))
    assert split[:6] == ["train", "train.jsonl", "6", "6", "0", "0"]
    assert "warning: train.jsonl: 1 of 6 rows with a prompt of fewer than 4 tokens" in done.err
    assert not Path("runs").exists()


def test_the_report_as_json(reft, spec):
    found = reft("check", spec, "--json", "--rows", 2).json
    assert found["steps"] == 9 and found["model"]["trainable_parameters"] == 390
    assert [row["row"] for row in found["rows"]] == [1, 2]
    assert found["data"]["train"]["counts"]["used"] == 6 and len(found["warnings"]) == 3


def test_without_the_weights(reft, spec, monkeypatch):
    monkeypatch.setattr(sys.modules["reft_cli.runs.check"], "load_base", None)  # the package has a function `check`
    done = reft("check", spec, "--no-model", "--rows", 0, "-q")
    assert done.code == 0 and "steps  9 (3 an epoch)" in done.out
    assert "trainable" not in done.out and "row 1" not in done.out


def test_overrides(reft, spec):
    assert reft("check", spec, "--no-model", "--json", "--set", "train.epochs=1").json["steps"] == 3


def test_where_the_memory_goes(reft, spec):
    lines = reft("check", spec, "--memory", "--rows", 0).out.splitlines()
    (line,) = [line for line in lines if line.strip().startswith("of it")]
    assert "weights 0 MiB; a pass of 32 tokens " in line and "predicted " in line and "measured" not in line
    assert not any(line.strip().startswith("of it") for line in reft("check", spec, "--rows", 0).out.splitlines())


@pytest.mark.parametrize("command", [["check"], ["train", "--max-steps", "1"]])
def test_data_beside_a_spec_that_is_elsewhere(reft, spec, tmp_path, monkeypatch, command):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = reft(*command, "../s.yaml")
    hint = "Paths count from where reft is started, and there is ../train.jsonl; start it in .."
    assert done.code == 3 and done.err.startswith("train.jsonl: no such file; ") and done.err.endswith(f"\n  {hint}\n")
    (tmp_path / "train.jsonl").unlink()
    assert "Paths count" not in reft(*command, "../s.yaml").err


def test_of_many_classes_the_first_are_counted(reft, spec):
    rows = [{"text": f"say {number}", "label": number % 30} for number in range(60)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = reft("check", spec, "--no-model", "--set", "task=classification").out
    assert "train labels: 0 2, 1 2, 2 2, " in said and ", 23 2 and 6 more\n" in said
    found = reft("check", spec, "--no-model", "--set", "task=classification", "--json").json
    assert len(found["data"]["train"]["labels"]) == 30


def test_what_comes_next_is_what_was_checked(reft, spec):
    Path("my spec.yaml").write_text(Path(spec).read_text())
    done = reft("check", "my spec.yaml", "--no-model", "--set", "train.epochs=2", "--set", "data.template=plain")
    command = "reft train 'my spec.yaml' --set train.epochs=2 --set data.template=plain"
    assert done.out.endswith(f"\nnext: {command}\n")
