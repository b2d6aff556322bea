"""Every suite from end to end: ten local rows in its real layout, a few steps on a tiny random model, a score."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from reft_cli import runs
from reft_cli.generation.settings import Answer
from reft_cli.runs.results import EvalReport
from reft_cli.runs.sources import rows_of
from reft_cli.runs.texts import load_training_data
from reft_cli.spec.load import load_spec
from reft_cli.suites import SUITES
from reft_cli.training.observer import NullObserver
from tiny_models import byte_tokenizer, config_of, encoder

ROWS = 10
CHOICES = {
    "boolq": "true/false",
    "piqa": "solution1/solution2",
    "winogrande": "option1/option2",
    "hellaswag": "ending1/ending2/ending3/ending4",
}
GLUE_COLUMNS = {
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "sst2": ("sentence",),
    "cola": ("sentence",),
}


def write(path: Path, rows: list[dict[str, Any]], *, lines: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))


def commonsense_row(number: int, name: str) -> dict[str, Any]:
    choices = CHOICES.get(name, "answer1/answer2")
    answer = choices.split("/")[number % 2]
    text = f"Please choose: which of {number}?\n\nAnswer format: {choices}"
    return {"instruction": text, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def arithmetic_row(number: int, name: str) -> dict[str, Any]:
    answer = "ABCDE"[number % 5] if name == "AQuA" else f"{number}.0"
    return {"instruction": f"What is {number} + 0?", "input": "", "output": f"It is {answer}", "answer": answer}


def glue_row(number: int, name: str) -> dict[str, Any]:
    label = 0.5 * number if name == "stsb" else number % (3 if name == "mnli" else 2)
    texts = dict.fromkeys(GLUE_COLUMNS.get(name, ("sentence1", "sentence2")), f"a text {number}")
    return texts | {"label": label, "idx": number}


@pytest.fixture(scope="session")
def datasets_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data as LLM-Adapters, the hub and pyreft's scripts lay them out."""
    folder = tmp_path_factory.mktemp("dataset")
    for name in ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"):
        for split in ("train", "test"):
            write(folder / name / f"{split}.json", [commonsense_row(number, name) for number in range(ROWS)])
    write(folder / "commonsense_170k/train.json", [commonsense_row(number, "boolq") for number in range(ROWS)])
    for name in ("AQuA", "gsm8k", "mawps", "SVAMP", "MultiArith", "AddSub", "SingleEq"):
        write(folder / name / "test.json", [arithmetic_row(number, name) for number in range(ROWS)])
    write(folder / "math_10k/train.json", [arithmetic_row(number, "") for number in range(ROWS)])
    solved = [{"question": f"{n} apples and none?", "answer": f"It is {n}.\n#### {n}"} for n in range(320)]
    write(folder / "gsm8k/main/train.jsonl", solved[:310], lines=True)
    write(folder / "gsm8k/main/test.jsonl", solved[310:], lines=True)
    write(
        folder / "ultrafeedback/train.json",
        [{"instruction": f"Say {n}", "input": "x" * (n % 2), "output": f"{n}"} for n in range(9)],
    )
    asked = [{"instruction": f"Say {n}", "output": f"{n}", "dataset": "x", "generator": "y"} for n in range(5)]
    write(folder / "alpaca_eval/test.json", asked)
    answers = {"correct_answers": ["Yes.", "Yes, always."], "incorrect_answers": ["No.", "Never.", "Who knows?"]}
    truths = [{"type": "x", "question": f"Is it {n}?", "best_answer": "Yes."} | answers for n in range(ROWS)]
    write(folder / "truthful_qa/validation.jsonl", truths, lines=True)
    rated = [{"prompt": f"Say {n}", "chosen": f"{n}", "rejected": "no"} for n in range(2 * ROWS)]
    write(folder / "synthetic-instruct-gptj-pairwise/train.jsonl", rated, lines=True)
    for name in ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"):
        validation = "validation_matched" if name == "mnli" else "validation"
        for split in ("train", validation):
            rows = [glue_row(number, name) for number in range(ROWS)]
            write(folder / "glue" / f"{name}/{split}.jsonl", rows, lines=True)
    return folder


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A decoder with room for Alpaca's prompt in bytes, and a RoBERTa."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("decoder", "encoder")}
    config = config_of("llama")
    config.max_position_embeddings, config.num_hidden_layers = 1024, 2
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folders["decoder"])
    encoder("roberta").base_model.save_pretrained(folders["encoder"])  # each task brings a head
    for folder in folders.values():
        byte_tokenizer().save_pretrained(folder)
    return folders


@pytest.fixture
def run_suite(bases: dict[str, Path], datasets_folder: Path, tmp_path: Path) -> Callable[..., EvalReport]:
    """Trains two steps of a suite and scores its test rows."""

    def run(suite: str, *sets: str) -> EvalReport:
        base = bases["encoder" if suite.startswith("glue/") else "decoder"]
        spec = tmp_path / "spec.yaml"
        spec.write_text(f"model: {{name: {base}, device: cpu}}\ntask: {suite}\ndata: {{folder: {datasets_folder}}}\n")
        small = ("train.max_steps=2", "train.global_batch_size=4", "generation.max_new_tokens=4", "evaluation.limit=4")
        loaded = load_spec(spec, overrides=[*small, *sets])
        result = runs.train(loaded, output=tmp_path / "run", observer=NullObserver())
        return runs.evaluate(result.run, observer=NullObserver())

    return run


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_trains_and_is_scored_on_local_rows(suite: str, run_suite: Callable[..., EvalReport]):
    sets = ["intervention.layers=[1]"] if suite in ("instruct", "preference/truthfulqa") else []
    sets += ['data.template={prompt: "{prompt}\\n", completion: "{chosen}"}'] if suite.startswith("reward/") else []
    report = run_suite(suite, *sets)
    metric = "loss" if suite == "instruct" else report.metric
    assert metric in report.metrics
    sets_scored = [name for name in report.metrics if name.startswith(f"{metric}/")]
    expected = {"commonsense": (8, 80), "arithmetic": (4, 40), "instruct": (0, 5)}
    expected |= {"preference/truthfulqa": (0, 4), "reward/synthetic_instruct": (0, 1)}  # two questions of two pairs
    rows = 5 if suite.startswith("glue/") else ROWS
    assert (len(sets_scored), report.rows) == expected.get(suite, (0, rows))
    if sets_scored:
        mean = sum(report.metrics[name] for name in sets_scored) / len(sets_scored)
        assert report.metrics[metric] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("suite", "text", "expected"),
    [
        (
            "commonsense",
            "the correct answer is answer1",
            {
                "exact_match": 0.25,
                "exact_match/social_i_qa": 0.5,
                "exact_match/boolq": 0.0,
                "exact_match/ARC-Easy": 0.5,
            },
        ),
        (
            "arithmetic",
            "Adam has 1,0 and 3. The answer is B, or 3.0",
            {
                "numeric_match": (0.2 + 3 * 0.1) / 4,  # AQuA: the A of Adam, for two rows of ten
                "numeric_match/AQuA": 0.2,
                "numeric_match/gsm8k": 0.1,
            },
        ),
        ("arithmetic/gsm8k", "It is 312.\n#### 312", {"numeric_match": 0.1}),
    ],
)
def test_answers_are_scored_as_published(
    suite: str,
    text: str,
    expected: dict[str, float],
    run_suite: Callable[..., EvalReport],
    monkeypatch: pytest.MonkeyPatch,
):
    def answers(decoder: object, requests: list[object], **settings: object) -> Iterator[tuple[int, Answer]]:
        return enumerate([Answer(text, 1, True)] * len(requests))

    monkeypatch.setattr("reft_cli.generation.decode.Decoder.answers", answers)
    metrics = run_suite(suite).metrics
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
)
STEPS = "\nAnswer the above question. First think step by step and then answer the final number.\n"
TEXTS: dict[tuple[str, ...], tuple[str, str, str | None]] = {
    ("commonsense/piqa",): (
        "Please choose: which of 1?\n\nAnswer format: solution1/solution2\n",
        "the correct answer is solution2",
        "solution2",
    ),
    ("arithmetic",): (ALPACA.format("What is 1 + 0?"), "It is 1.0", "1.0"),
    ("arithmetic/gsm8k",): (f"1 apples and none?{STEPS}", "It is 1.\nThe final answer is:  1", None),
    ("instruct",): (ALPACA_WITH_INPUT.format("Say 1", "x"), "1", None),
    ("instruct", "intervention.method=red"): ("Human: Say 1\n\nAssistant: ", "1", None),
    ("glue/qnli",): ("a text 1", "", None),
    ("preference/truthfulqa",): ("[INST] Is it 0? [/INST]", " Yes, always.", None),
}


@pytest.mark.parametrize("asked", TEXTS, ids=" ".join)
def test_what_the_model_reads_is_what_was_published(
    asked: tuple[str, ...], bases: dict[str, Path], datasets_folder: Path, tmp_path: Path
):
    suite, *sets = asked
    base = bases["encoder" if suite.startswith("glue/") else "decoder"]
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"model: {base}\ntask: {suite}\ndata: {{folder: {datasets_folder}}}\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    data = load_training_data(load_spec(spec, overrides=sets).spec, tokenizer)
    example = data.train.examples[1]
    assert (example.prompt, example.completion, example.reference) == TEXTS[asked]


def test_the_alpaca_template_without_an_input(bases: dict[str, Path], datasets_folder: Path, tmp_path: Path):
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"model: {bases['decoder']}\ntask: instruct\ndata: {{folder: {datasets_folder}}}\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bases["decoder"])
    data = load_training_data(load_spec(spec).spec, tokenizer)
    assert data.train.examples[0].prompt == ALPACA.format("Say 0")


def test_glue_divides_its_validation_rows_under_the_seed(bases: dict[str, Path], datasets_folder: Path, tmp_path: Path):
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"model: {bases['encoder']}\ntask: glue/rte\ndata: {{folder: {datasets_folder}}}\n")
    seen = set()
    for seed in range(3):
        loaded = load_spec(spec, overrides=[f"train.seed={seed}"]).spec
        chosen, rest = rows_of(loaded, "validation"), rows_of(loaded, "test")
        assert len(chosen) == len(rest) == ROWS // 2
        assert sorted(chosen.numbers + rest.numbers) == list(range(1, ROWS + 1))
        assert rows_of(loaded, "validation").numbers == chosen.numbers
        seen.add(tuple(chosen.numbers))
    assert len(seen) == 3


def test_gsm8k_chooses_on_the_last_300_training_rows(bases: dict[str, Path], datasets_folder: Path, tmp_path: Path):
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"model: {bases['decoder']}\ntask: arithmetic/gsm8k\ndata: {{folder: {datasets_folder}}}\n")
    loaded = load_spec(spec).spec
    assert [row["question"][:2] for row in rows_of(loaded, "train").rows[::9]] == ["0 ", "9 "]
    assert rows_of(loaded, "validation").numbers == list(range(11, 311))
    assert rows_of(loaded, "test").rows[0]["question"].startswith("310 ")
