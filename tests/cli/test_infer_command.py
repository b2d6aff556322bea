"""`reft infer` with a stand-in for a session: one prompt, rows in and out, and which flags go together."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from stand_ins import FakeSession, Terminal


@pytest.fixture
def session(monkeypatch):
    fake = FakeSession()
    monkeypatch.setattr("reft_cli.runs.open_run", lambda run, **flags: fake.opened.update(flags, run=run) or fake)
    return fake


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A file with 600 rows, more than are answered at once."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": f"row {index} ä", "id": index}) for index in range(600)]
    Path("in.jsonl").write_text("\n".join(lines) + "\n")
    return "in.jsonl"


def piped(content: str | bytes) -> io.TextIOWrapper:
    """Standard input with this content."""
    return io.TextIOWrapper(io.BytesIO(content if isinstance(content, bytes) else content.encode()))


# ---- one prompt


def test_the_completion_and_nothing_else(reft, session):
    done = reft("infer", "runs/s", "--prompt", "good")
    assert (done.code, done.out, done.err) == (0, "GOOD\n", "")
    assert session.opened["run"] == Path("runs/s") and session.opened["checkpoint"] is None


def test_verbose_says_where_the_time_went(reft, session):
    done = reft("infer", "runs/s", "--prompt", "good", "-v")
    told = r"importing torch and transformers \d+\.\d\d s, loading the model \d.* s, answering \d.* s\n"
    assert re.search(told, done.err)
    assert "decoded by transformers' generate: there is no model" in done.err


def test_verbose_shows_no_bar_of_a_library_in_a_pipe(reft, here):
    done = reft("infer", "runs/s", "--prompt", "aa? ", "-v")
    assert done.code == 0 and "answering" in done.err and "\r" not in done.err and "Loading weights" not in done.err


def test_the_base_alone(reft, session):
    assert reft("infer", "runs/s", "--prompt", "good", "--base").out == "doog\n"


def test_both_models_are_labelled_lines_in_a_pipe(reft, session):
    assert reft("infer", "runs/s", "--prompt", "good", "--compare").out == "base: doog\nrun: GOOD\n"


def test_both_models_stand_side_by_side_on_a_terminal(reft, session, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    assert reft("infer", "runs/s", "--prompt", "good", "--compare").code == 0
    line = next(line for line in screen.getvalue().splitlines() if "doog" in line)
    assert "GOOD" in line


def test_json(reft, session):
    assert reft("infer", "runs/s", "--prompt", "good", "--json").json == {
        "prompt": "good",
        "answer": " GOOD\n",
        "tokens": 4,
        "finished": True,
    }
    both = reft("infer", "runs/s", "--prompt", "good", "--json", "--compare").json
    assert both["base"]["answer"] == " doog\n" and both["run"]["answer"] == " GOOD\n"


def test_any_setting_reaches_the_session_and_flags_win(reft, session):
    sets = ["generation.beams=3", "generation.stop=[end]", "generation.top_k=4"]
    reft("infer", "runs/s", "--prompt", "good", *(word for each in sets for word in ("--set", each)), "--top-k", "9")
    assert session.calls[0]["settings"] == {"beams": 3, "stop": ["end"], "top_k": 9}


def test_any_setting_decides_how_a_run_answers(reft, here):
    sets = ["--set", "generation.max_new_tokens=1", "--set", "generation.beams=2"]
    done = reft("infer", "runs/s", "--prompt", "aa? ", "--json", "-v", *sets)
    assert done.json["tokens"] == 1 and "decoded by transformers' generate: beams need" in done.err


def test_settings_reach_the_session(reft, session):
    words = "--max-new-tokens 5 --temperature 0.5 --top-p 0.9 --top-k 3 --seed 7 --checkpoint 40 --device cpu"
    reft("infer", "runs/s", "--prompt", "x", "--raw", *words.split())
    assert session.calls[0]["raw"] is True
    assert session.calls[0]["settings"] == {
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "seed": 7,
    }
    assert (session.opened["checkpoint"], session.opened["place"].device) == ("40", "cpu")


def test_columns_of_one_row(reft, session):
    assert reft("infer", "runs/s", "--field", "text=a=b", "--field", "who=me").out == "A=B\n"
    assert session.calls[0]["prompts"] == [{"text": "a=b", "who": "me"}]


def test_a_stream_is_the_same_text(reft, session):
    assert reft("infer", "runs/s", "--prompt", " two  words ", "--stream").out == "TWO  WORDS\n"


def test_on_a_terminal_answers_stream(reft, session, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(FakeSession, "answers", None)
    monkeypatch.setattr(FakeSession, "stream", lambda self, prompt, **how: iter([" piece", " by piece"]))
    assert reft("infer", "runs/s", "--prompt", "x").code == 0
    assert screen.getvalue() == "piece by piece\n"


def test_several_samples(reft, session, rows):
    flags = ("--temperature", "1", "--samples", "2")
    assert reft("infer", "runs/s", "--prompt", "good", *flags).out == "GOOD\nGOOD!\n"
    both = reft("infer", "runs/s", "--prompt", "good", "--compare", *flags).out
    assert both == "base: doog\nbase: doog!\nrun: GOOD\nrun: GOOD!\n"
    found = reft("infer", "runs/s", "--prompt", "good", "--json", *flags).json
    assert [each["answer"] for each in found["answers"]] == [" GOOD\n", " GOOD!\n"]
    line = json.loads(reft("infer", "runs/s", "--input", rows, *flags).out.splitlines()[3])
    assert line["prediction"] == [" ROW 3 Ä\n", " ROW 3 Ä!\n"]


# ---- rows


def test_rows_in_rows_out_in_order(reft, session, rows):
    done = reft("infer", "runs/s", "--input", rows)
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["id"] for line in lines] == list(range(600))
    assert lines[7] == {"text": "row 7 ä", "id": 7, "prediction": " ROW 7 Ä\n"}
    assert "ä" in done.out


def test_rows_from_stdin_answered_by_both(reft, session, monkeypatch):
    monkeypatch.setattr(sys, "stdin", piped('{"text": "a"}\n\n{"text": "bc"}\n'))
    lines = [json.loads(line) for line in reft("infer", "runs/s", "--input", "-", "--compare", "-q").out.splitlines()]
    assert lines[1] == {"text": "bc", "base_prediction": " cb\n", "prediction": " BC\n"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"text": "a"}\nplain words\n', "stdin:2: not JSON (expecting value, column 1)\n  One JSON object a line"),
        ('"a"\n', "stdin:1: a row has to be an object"),
        (b'{"text": "\xff"}\n', "stdin:1: not UTF-8 text"),
        ("", "stdin: no rows"),
        ('{"words": "a"}\n', "no column `text`"),
        ('{"text": "a", "prediction": 1}\n', "has a column `prediction`, where the answer goes"),
    ],
)
def test_rows_that_cannot_be_answered(reft, session, monkeypatch, text, said):
    monkeypatch.setattr(sys, "stdin", piped(text))
    done = reft("infer", "runs/s", "--input", "-")
    assert done.code == 3 and done.out == "" and said in done.err


def test_rows_from_stdin_may_begin_with_a_byte_order_mark(reft, session, monkeypatch):
    monkeypatch.setattr(sys, "stdin", piped("\ufeff" + '{"text": "a\u2028b"}\r\n{"text": "c"}\r\n'))
    lines = reft("infer", "runs/s", "--input", "-", "-q").out.split("\n")[:-1]
    assert [json.loads(line)["text"] for line in lines] == ["a\u2028b", "c"]


def test_answers_are_json_whatever_the_rows_hold(reft, session, tmp_path, monkeypatch):
    """NaN is no JSON, and half of a surrogate pair ended the program where a file was written."""
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"text": "a", "half": "\\ud83d", "gap": NaN}\n{"text": "b"}\n')
    assert reft("infer", "runs/s", "--input", "in.jsonl", "-o", "out.jsonl").code == 0
    for text in (Path("out.jsonl").read_text(), reft("infer", "runs/s", "--input", "in.jsonl", "-q").out):
        row = json.loads(text.split("\n")[0], parse_constant=pytest.fail)
        assert row == {"text": "a", "half": "\ud83d", "gap": None, "prediction": " A\n"}


def test_raw_rows_are_taken_from_the_column_prompt(reft, session, monkeypatch):
    monkeypatch.setattr(sys, "stdin", piped('{"prompt": "as it is"}\n'))
    reft("infer", "runs/s", "--input", "-", "--raw")
    assert session.calls[0]["prompts"] == ["as it is"] and session.calls[0]["raw"]
    monkeypatch.setattr(sys, "stdin", piped('{"text": "x"}\n'))
    assert "--raw takes the text of column `prompt`" in reft("infer", "runs/s", "--input", "-", "--raw").err


def test_an_output_file(reft, session, rows):
    done = reft("infer", "runs/s", "--input", rows, "-o", "sub/out.jsonl")
    assert done.out == "sub/out.jsonl\n"
    assert len(Path("sub/out.jsonl").read_text().splitlines()) == 600


def test_an_output_is_gone_on_with(reft, session, rows):
    reft("infer", "runs/s", "--input", rows, "-o", "whole.jsonl")
    whole = Path("whole.jsonl").read_text()
    torn = whole[: len(whole) // 2]
    Path("part.jsonl").write_text(torn)
    done = reft("infer", "runs/s", "--input", rows, "-o", "part.jsonl")
    assert done.code == 2 and "part.jsonl exists; go on with it by --resume" in done.err
    session.calls.clear()
    done = reft("infer", "runs/s", "--input", rows, "-o", "part.jsonl", "--resume")
    assert "answering: 600 rows, from row" in done.err
    assert sum(len(call["prompts"]) for call in session.calls) == 600 - torn.count("\n")
    assert Path("part.jsonl").read_text() == whole


def test_an_output_of_any_text_is_gone_on_with(reft, session, tmp_path, monkeypatch):
    """`str.splitlines` broke lines at U+2028 and U+0085, and NaN is not equal to itself."""
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"text": "a\u2028b\x85c", "gap": NaN}\n{"text": "d"}\n', encoding="utf-8")
    reft("infer", "runs/s", "--input", "in.jsonl", "-o", "out.jsonl")
    done = reft("infer", "runs/s", "--input", "in.jsonl", "-o", "out.jsonl", "--resume")
    assert done.code == 0 and "answering: 2 rows, from row 2" in done.err


@pytest.mark.parametrize("content", [b"not json\n", b"\xff\n", b"7\n"])
def test_an_output_that_is_none_is_refused(reft, session, rows, content):
    Path("out.jsonl").write_bytes(content)
    done = reft("infer", "runs/s", "--input", rows, "-o", "out.jsonl", "--resume")
    assert done.code == 2 and "out.jsonl:1 is not the answer to row 1" in done.err
    done = reft("infer", "runs/s", "--input", rows, "-o", ".", "--resume")
    assert done.code == 2 and ".: cannot be read: is a directory" in done.err


def test_an_output_of_other_rows_is_refused(reft, session, rows):
    Path("out.jsonl").write_text('{"text": "something else", "prediction": "x"}\n')
    done = reft("infer", "runs/s", "--input", rows, "-o", "out.jsonl", "--resume")
    assert done.code == 2 and "out.jsonl:1 is not the answer to row 1 of in.jsonl" in done.err


def test_an_output_that_cannot_be_written(reft, session, rows):
    done = reft("infer", "runs/s", "--input", rows, "-o", "in.jsonl/x")
    assert done.code == 2 and "in.jsonl/x: cannot be written" in done.err


# ---- flags


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to answer; give --prompt"),
        (["--prompt", "x", "--chat"], "--prompt and --chat do not go together"),
        (["--prompt", "x", "--input", "f"], "--prompt and --input do not go together"),
        (["--prompt", "x", "--base", "--compare"], "--base and --compare do not go together"),
        (["--chat", "--json"], "--chat and --json"),
        (["--field", "a=b", "--raw"], "--field and --raw"),
        (["--prompt", "x", "--stream", "--json"], "--stream and --json"),
        (["--prompt", "x", "--output", "f"], "--output goes with --input"),
        (["--input", "f", "--resume"], "--resume goes with --output"),
        (["--field", "words"], "--field words: write NAME=TEXT"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["--prompt", "x", "--top-p", "0"], "--top-p"),
    ],
)
def test_flags_that_do_not_go_together(reft, session, words, said):
    done = reft("infer", "runs/s", *words)
    assert done.code == 2 and said in done.err and done.out == "" and not session.calls


def test_a_run_that_is_not_there(reft, tmp_path):
    done = reft("infer", tmp_path / "none", "--prompt", "x", "--json")
    assert done.code == 4 and done.error["kind"] == "checkpoint"
