"""`reft eval` with a stand-in for runs.evaluate: tables, JSON, and --fail-under as a gate."""

from pathlib import Path

import pytest

from reft_cli.runs import BasePlace, EvalReport

SCORES = {"loss": 0.5, "accuracy": 0.6}
BASE = {"loss": 7.0, "accuracy": 0.25}


@pytest.fixture
def calls(monkeypatch):
    """The calls of runs.evaluate, which scores nothing."""
    made = []

    def evaluate(run, *, base, **flags):
        made.append({"run": run, "base": base} | flags)
        return EvalReport(
            run=run,
            checkpoint=run / "checkpoints/step_000040",
            data="test.jsonl",
            rows=400,
            metric="accuracy",
            metrics=SCORES if base != "only" else {},
            base_metrics=BASE if base != "none" else {},
            seconds=2.0,
            path=run / "eval/test.json",
        )

    def evaluate_tasks(run, *, tasks, **flags):
        return evaluate(run, tasks=tasks, **flags)

    monkeypatch.setattr("reft_cli.runs.evaluate", evaluate)
    monkeypatch.setattr("reft_cli.runs.evaluate_tasks", evaluate_tasks)
    return made


@pytest.mark.parametrize(
    ("flag", "table"),
    [
        ([], [["metric", "run"], ["loss", "0.5000"], ["accuracy", "0.6000"]]),
        (["--base"], [["metric", "base"], ["loss", "7.0000"], ["accuracy", "0.2500"]]),
        (
            ["--compare-base"],
            [
                ["metric", "base", "run", "difference"],
                ["loss", "7.0000", "0.5000", "-6.5000"],
                ["accuracy", "0.2500", "0.6000", "+0.3500"],
            ],
        ),
    ],
)
def test_the_table_is_all_of_stdout(reft, calls, flag, table):
    done = reft("eval", "runs/s", *flag)
    assert [line.split() for line in done.out.splitlines()] == table
    assert "400 rows of test.jsonl in 2s" in done.err and "kept in runs/s/eval/test.json" in done.err


def test_the_report_as_json(reft, calls):
    found = reft("eval", "runs/s", "--json").json
    assert found["metrics"] == SCORES and found["checkpoint"] == "runs/s/checkpoints/step_000040"


def test_flags_reach_the_evaluation(reft, calls):
    words = "--data d.csv --split validation --limit 5 --batch-size 2 --checkpoint 40 --device cpu --model m --loss"
    words += " --set generation.beams=3 --compile off"
    reft("eval", "runs/s", *words.split(), "--trust-remote-code")
    call = calls[0]
    assert call["run"] == Path("runs/s") and call["base"] == "none" and call["loss"]
    assert call["generation"] == {"beams": 3, "compile": "off"}
    assert (call["data"], call["split"], call["limit"], call["batch_size"]) == ("d.csv", "validation", 5, 2)
    assert call["checkpoint"] == "40"
    assert call["place"] == BasePlace(device="cpu", model="m", trust_remote_code=True)


@pytest.mark.parametrize(
    ("gates", "code"),
    [(["accuracy=0.6"], 0), (["accuracy=0.61"], 7), (["accuracy=0.5", "accuracy=0.7"], 7), (["accuracy=nan"], 7)],
)
def test_the_gate(reft, calls, gates, code):
    done = reft("eval", "runs/s", *(word for gate in gates for word in ("--fail-under", gate)))
    assert done.code == code and "accuracy" in done.out
    if code:
        assert "accuracy is 0.6000, below" in done.err


def test_the_gate_as_json_comes_after_the_result(reft, calls):
    done = reft("eval", "runs/s", "--json", "-q", "--fail-under", "accuracy=0.9")
    assert done.json["metrics"] == SCORES
    assert done.error["code"] == 7 and done.error["kind"] == "threshold"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fail-under", "accuracy"], "--fail-under accuracy: write METRIC=NUMBER"),
        (["--fail-under", "accuracy=high"], "write METRIC=NUMBER"),
        (["--fail-under", "acc=0.5"], "--fail-under acc=0.5: no such score; there are exact_match, accuracy, f1, "),
        (["--fail-under", "acc=0.5"], "perplexity, margin; did you mean `accuracy`?"),
        (["--fail-under", "loss=2"], "a low loss is a good one"),
        (["--base", "--compare-base"], "give one of them"),
        (["--limit", "0"], "--limit"),
    ],
)
def test_flags_that_cannot_be_are_refused_before_any_work(reft, calls, words, said):
    done = reft("eval", "runs/s", *words)
    assert done.code == 2 and said in done.err and not calls


@pytest.mark.parametrize(
    ("words", "processes", "device"),
    [
        ("", "auto", "auto"),
        ("--device cuda", "auto", "cuda"),
        ("--processes 2", 2, "auto"),
        ("--processes 1", 1, "auto"),
        ("--device-map auto", 1, "auto"),
        ("--tasks a", 1, "auto"),
    ],
)
def test_rows_are_shared_out_over_the_gpus_that_there_are(reft, calls, monkeypatch, words, processes, device):
    asked = []
    monkeypatch.setattr("reft_cli.cli.eval.as_several", lambda *given, **how: asked.append((*given, how)))
    reft("eval", "runs/s", *words.split())
    assert asked == [(processes, {"device": device})] and len(calls) == 1


def test_a_gate_for_a_score_that_there_is_not(reft, calls):
    done = reft("eval", "runs/s", "--fail-under", "f1=0.5")
    assert done.code == 2 and "--fail-under f1: no such score; there are loss, accuracy" in done.err


def test_running_out_of_memory_is_code_5(reft, monkeypatch):
    import torch

    def evaluate(run, **flags):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr("reft_cli.runs.evaluate", evaluate)
    done = reft("eval", "runs/s", "--json")
    assert done.code == 5 and done.error["kind"] == "memory" and "--batch-size" in done.error["hint"]


def test_tasks_of_the_harness_take_the_place_of_data(reft, calls):
    words = "--tasks arc_easy,hellaswag --task-folder mine --few-shot 5 --chat --limit 3 --batch-size 2 --compare-base"
    done = reft("eval", "runs/s", *words.split())
    (call,) = calls
    assert call["tasks"] == ["arc_easy", "hellaswag"] and call["folder"] == Path("mine")
    assert (call["few_shot"], call["chat"], call["limit"], call["batch_size"]) == (5, True, 3, 2)
    assert call["base"] == "compare" and call["place"] == BasePlace() and "data" not in call and "accuracy" in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tasks a --data d.csv", "--data and --tasks: a task brings its own rows; give one of them"),
        ("--tasks a --split test", "--split and --tasks: a task brings its own rows; give one of them"),
        ("--tasks a,,b", "--tasks a,,b: write names with commas between them, for example arc_easy,hellaswag"),
        ("--tasks a --compile on", "--compile and --tasks: tasks are read more than written; leave --compile out"),
        ("--tasks a --set generation.beams=2", "--set and --tasks: a task says itself how its answers are decoded"),
        ("--set train.epochs=2", "a trained run takes keys of generation only, such as generation.beams=4"),
        ("--tasks a --loss", "--loss and --tasks: a task has its own scores; leave --loss out"),
        ("--tasks a --processes 2", "--processes: tasks of lm-evaluation-harness run in one process; leave it out"),
        ("--few-shot 2", "--few-shot belongs to --tasks; the run's own data are scored as they were trained"),
        ("--task-folder x", "--task-folder belongs to --tasks"),
        ("--chat", "--chat belongs to --tasks"),
    ],
)
def test_flags_of_tasks_that_cannot_be(reft, calls, words, message):
    done = reft("eval", "runs/s", *words.split())
    assert done.code == 2 and message in done.err and not calls
