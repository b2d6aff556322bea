"""`reft eval --tasks`: with lm-evaluation-harness where it is installed, and with a stand-in, on tasks in a folder."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

import lm_eval_stand_in
from reft_cli import runs
from reft_cli.errors import DataError, ReftError, SpecError
from reft_cli.runs.harness import INSTALL, evaluate_tasks
from reft_cli.training.observer import NullObserver

CPU = runs.BasePlace(device="cpu")
REAL = importlib.util.find_spec("lm_eval") is not None
installed = pytest.mark.skipif(not REAL, reason="lm-eval is not installed")
# What lm-eval and its libraries warn of is not ours to put right.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=["stand-in", pytest.param("lm-eval", marks=installed)])
def harness(request, monkeypatch):
    """Which one it is."""
    monkeypatch.delitem(sys.modules, "reft_cli.evaluation.lm_eval_model", raising=False)
    if request.param == "stand-in":
        lm_eval_stand_in.install(monkeypatch)
    yield request.param
    sys.modules.pop("reft_cli.evaluation.lm_eval_model", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data_dir) -> Path:
    """Tasks on the test rows: by likelihood of the choices, by writing, perplexity, and a group of the first two."""
    place = tmp_path_factory.mktemp("tasks")
    rows = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data_dir / "test.jsonl")}}}
    shared = rows | {"test_split": "test", "doc_to_text": "{{text}} ->", "num_fewshot": None}
    choices = {"output_type": "multiple_choice", "doc_to_choice": ["yes", "no"], "doc_to_target": "label"}
    write = {
        "output_type": "generate_until",
        "doc_to_target": " {{label}}",
        "generation_kwargs": {"max_gen_toks": 4, "until": ["\n"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    rolling = rows | {
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    tasks = {"local_choice": shared | choices, "local_write": shared | write, "local_rolling": rolling}
    for name, task in tasks.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | task))
    lost = tasks["local_choice"] | {
        "task": "local_lost",
        "dataset_kwargs": {"data_files": {"test": "/none/such.jsonl"}},
    }
    (place / "local_lost.yaml").write_text(yaml.safe_dump(lost))
    return place


def scored(run, tasks, folder, **how):
    return evaluate_tasks(run, tasks=tasks, folder=folder, place=CPU, observer=NullObserver(), **how)


@pytest.mark.parametrize("positions", ["f2+l2", "all"])
def test_scores_are_our_own_whatever_the_batch_and_the_padding_side(harness, trained, folder, positions, monkeypatch):
    run = trained(f"intervention.positions={positions}")
    names = ["local_choice", "local_write"]
    found = {size: scored(run, names, folder, batch_size=size).metrics for size in (1, 4, 16)}
    assert found[1] == found[4] == found[16]
    own = runs.evaluate(run, observer=NullObserver(), place=CPU)
    assert found[1]["local_write/exact_match"] == own.metrics["exact_match"]

    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(PreTrainedTokenizerFast, "padding_side", "left")
    assert scored(run, names, folder, batch_size=4).metrics == found[1]


def test_likelihoods_add_up_to_our_loss(harness, trained, folder):
    run = trained("data.append_eos=false")
    report = scored(run, ["local_choice"], folder)
    own = runs.evaluate(run, loss=True, observer=NullObserver(), place=CPU)
    samples = _samples(run, "local_choice")
    total = tokens = 0.0
    for sample in samples:
        right = ["yes", "no"].index(sample["doc"]["label"])
        total -= float(sample["resps"][right][0][0])
        tokens += len(f" {sample['doc']['label']}")  # bytes are tokens
    assert own.metrics["loss"] == pytest.approx(total / tokens, abs=1e-5)
    better = [
        max((0, 1), key=lambda i: float(s["resps"][i][0][0])) == ["yes", "no"].index(s["doc"]["label"]) for s in samples
    ]
    assert report.metrics["local_choice/acc"] == sum(better) / len(better)


@installed
def test_the_base_scores_as_in_lm_eval_itself(trained, folder):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    run = trained()
    names = ["local_choice", "local_write", "local_rolling"]
    report = scored(run, names, folder, base="only", batch_size=3)
    with runs.open_run(run, place=CPU) as session:
        plain = HFLM(pretrained=session.model.base_model, tokenizer=session.text.tokenizer, batch_size=1)
        theirs = simple_evaluate(model=plain, tasks=names, task_manager=TaskManager(include_path=str(folder)))
    for key, value in report.base_metrics.items():
        task, metric = key.split("/")
        assert value == pytest.approx(theirs["results"][task][f"{metric},none"], rel=1e-5), key
    assert report.metrics == {}


@installed
def test_nothing_is_said_where_there_is_no_repository(trained, folder, tmp_path, monkeypatch, capfd):
    run = trained()
    monkeypatch.chdir(tmp_path)
    evaluate_tasks(run, tasks=["local_choice"], folder=folder, limit=1, observer=NullObserver())
    assert "fatal" not in capfd.readouterr().err
    (results,) = (run / "eval").glob("lm_eval-first_1-step_*/results_*.json")
    assert json.loads(results.read_text())["git_hash"] is None


def test_results_that_lm_eval_cannot_write_are_no_bug_of_ours(harness, trained, folder, monkeypatch):
    from lm_eval.loggers import EvaluationTracker

    monkeypatch.setattr(EvaluationTracker, "save_results_aggregated", lambda *_, **__: None)  # it says so in its log
    with pytest.raises(
        ReftError, match=r"/eval/lm_eval-first_1-step_\d+: lm-eval could not write its results there; see"
    ):
        scored(trained(), ["local_choice"], folder, limit=1)


def test_what_is_kept_is_lm_evals_own_format(harness, trained, folder):
    run = trained("intervention.rank=3")
    report = scored(run, ["local_*ing", "local_choice"], folder, base="compare", limit=3)
    assert report.rows == 6 and report.data == "local_rolling, local_choice"
    assert set(report.metrics) == set(report.base_metrics) >= {"local_choice/acc", "local_rolling/byte_perplexity"}
    kept = json.loads(report.path.read_text())
    assert report.path.parent == run / "eval" and kept["metrics"] == report.metrics
    assert len(kept["files"]) == 2
    for file, intervened in zip(kept["files"], (False, True), strict=True):
        theirs = json.loads((run / file).read_text())
        facts = theirs["config"]["reft"]
        assert facts["intervened"] is intervened and facts["requests_without_prompt"] == 3
        assert {"results", "configs", "versions", "n-samples", "task_hashes"} <= set(theirs)
        assert theirs["config"]["limit"] == 3
    # Perplexity has no prompt: the base model's.
    assert report.metrics["local_rolling/byte_perplexity"] == report.base_metrics["local_rolling/byte_perplexity"]


@installed
def test_solved_rows_go_before_the_prompt(trained, folder):
    run = trained()
    scored(run, ["local_choice"], folder, few_shot=1)
    assert _samples(run, "local_choice")[0]["arguments"]["gen_args_0"]["arg_0"].count("->") == 2


def test_unknown_tasks_and_lost_data(harness, trained, folder, tmp_path):
    run = trained()
    with pytest.raises(SpecError) as unknown:
        scored(run, ["local_chioce"], folder)
    assert str(unknown.value) == "--tasks local_chioce: lm-eval has no such task; did you mean `local_choice`?"
    with pytest.raises(DataError) as lost:
        scored(run, ["local_lost"], folder)
    assert "--tasks local_lost: its data cannot be had: " in str(lost.value) and "such.jsonl" in str(lost.value)
    with pytest.raises(SpecError) as nowhere:
        scored(run, ["local_choice"], tmp_path / "none")
    assert "no such folder" in str(nowhere.value)
    with pytest.raises(SpecError) as unchatty:
        scored(run, ["local_choice"], folder, chat=True)
    assert "--chat: the tokenizer has no chat template" in str(unchatty.value)


def test_a_classifier_writes_no_text(harness, trained, folder):
    run = trained("task={kind: classification}", "data.template=null")
    with pytest.raises(SpecError, match=r"has task\.kind classification, which writes no text"):
        scored(run, ["local_choice"], folder)


def test_without_lm_eval_there_is_the_command_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecError) as missing:
        scored(tmp_path, ["arc_easy"], None)
    assert str(missing.value) == INSTALL == "--tasks needs lm-eval: pip install 'reft[eval]'"


def _samples(run, task):
    found = [*(run / "eval").glob(f"*/samples_{task}_2*.jsonl")]
    newest = max(found, key=lambda file: file.stat().st_mtime_ns)
    return [json.loads(line) for line in newest.read_text().splitlines()]
