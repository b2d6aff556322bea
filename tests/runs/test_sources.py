"""What `data` means: lists of sources, local copies, templates of a source's own, solved rows before prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from reft_cli import runs
from reft_cli.errors import DataError, ReftError, SpecError
from reft_cli.runs.sources import rows_of, source_of, training_rows
from reft_cli.runs.texts import TrainingData, load_training_data
from reft_cli.spec.load import load_spec
from reft_cli.spec.schema import Spec
from reft_cli.training.observer import NullObserver
from tiny_models import byte_tokenizer

TEMPLATE = {"prompt": "Q: {q}\nA:", "completion": " {a}"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    sums = [{"q": f"{n}+1", "a": str(n + 1)} for n in range(8)]
    words = [{"text": f"word {n}", "label": "yes" if n % 2 else "no"} for n in range(4)]
    for name, rows in (("sums.train", sums), ("sums.test", sums[:3]), ("words", words)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def spec(folder: Path) -> Callable[..., Spec]:
    def load(data: dict[str, Any], **more: Any) -> Spec:
        path = folder / "spec.yaml"
        path.write_text(yaml.safe_dump({"model": "m", "data": data, **more}))
        return load_spec(path).spec

    return load


@pytest.fixture
def encoded(spec: Callable[..., Spec]) -> Callable[..., TrainingData]:
    return lambda data, **more: load_training_data(spec(data, **more), byte_tokenizer())


def test_a_mix_repeats_rows_by_weight_and_names_their_sources(spec: Callable[..., Spec]):
    words = {"path": "words.jsonl"}
    rows = rows_of(spec({"train": ["sums.train.jsonl", words | {"weight": 2}, words | {"limit": 1}]}), "train")
    assert (len(rows), rows.name) == (8 + 8 + 1, "sums.train and 2 more")
    assert rows.sources is not None and list(dict.fromkeys(rows.sources)) == ["sums.train", "words", "words-3"]
    assert rows.where(8) == rows.where(12) == "words.jsonl:1"


def test_a_limit_is_of_each_source(spec: Callable[..., Spec]):
    loaded = spec({"train": "x.jsonl", "test": ["sums.test.jsonl", {"path": "words.jsonl", "name": "w"}]})
    assert rows_of(loaded, "test", limit=2).sources == ["sums.test", "sums.test", "w", "w"]
    loaded = spec(
        {"train": "sums.train.jsonl", "validation": ["sums.test.jsonl", "words.jsonl"]}, evaluation={"limit": 1}
    )
    held_out = training_rows(loaded)[1]
    assert held_out is not None and held_out.sources == ["sums.test", "words"]


def test_shares_before_limits(spec: Callable[..., Spec]):
    data = {"train": {"path": "sums.train.jsonl", "share": 6, "limit": 2}}
    drawn = rows_of(spec({"train": {"path": "sums.train.jsonl", "share": 6}}), "train")
    assert rows_of(spec(data), "train").numbers == drawn.numbers[:2]


@pytest.mark.parametrize("split", ["train", "test"])
def test_local_copies_are_files_or_folders(spec: Callable[..., Spec], folder: Path, split: str):
    data = {"folder": str(folder), split: {"path": "owner/sums", "subset": "main", "revision": "v1", "local": "sums"}}
    loaded = spec(data).data
    source = source_of(loaded, getattr(loaded, split), split)
    assert (source.path, source.split, source.subset) == (str(folder / f"sums.{split}.jsonl"), None, None)
    (folder / "sums").mkdir()
    source = source_of(loaded, getattr(loaded, split), split)
    assert (source.path, source.split, source.revision) == (str(folder / "sums"), split, None)
    loaded = spec({key: value for key, value in data.items() if key != "folder"}).data
    source = source_of(loaded, getattr(loaded, split), split)
    assert (source.path, source.split, source.subset, source.revision) == ("owner/sums", split, "main", "v1")


def test_a_slice_of_a_local_copy(spec: Callable[..., Spec], folder: Path):
    data = {"folder": str(folder), "train": {"path": "owner/sums", "local": "sums", "split": "train[-3:]"}}
    assert rows_of(spec(data), "train").numbers == [6, 7, 8]
    data["train"]["local"] = "nothing"
    with pytest.raises(DataError) as caught:
        rows_of(spec(data), "train")
    assert str(caught.value).startswith(f"{folder}/nothing: no such file; there is ")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("sums.train.jsonl", {"limit": 3}),
        ({"path": "sums.train.jsonl", "limit": 3}, {"split": "test"}),
        ({"path": "sums.train.jsonl", "split": "[:3]"}, {"split": "[:3]", "name": "t"}),
        ({"path": "sums.train.jsonl", "share": 0.5}, {"share": 0.5}),
        ({"path": "sums", "split": "train"}, {"split": "train", "limit": 2}),
    ],
)
def test_rows_that_are_trained_on_are_no_others(spec: Callable[..., Spec], train: Any, test: Any):
    with pytest.raises(SpecError) as caught:
        rows_of(spec({"train": train, "test": test}), "test")
    assert str(caught.value) == (
        "data.test: has no path of its own, so these are rows of data.train; give a path, or another split or slice"
    )


@pytest.mark.parametrize(
    ("train", "test", "numbers"),
    [
        ({"path": "sums.train.jsonl", "split": "[:6]"}, {"split": "[6:]"}, [7, 8]),
        ({"path": "sums.train.jsonl", "split": "[2:]"}, {"limit": 2}, [1, 2]),
        ({"path": "sums.train.jsonl", "share": 6}, {"share": 6, "rest": True}, None),
    ],
)
def test_other_parts_of_the_training_file(spec: Callable[..., Spec], train: Any, test: Any, numbers: list[int] | None):
    loaded = spec({"train": train, "test": test})
    found = rows_of(loaded, "test").numbers
    assert len(found) == 2 and not {*found} & {*rows_of(loaded, "train").numbers}
    assert numbers in (None, found)


def test_without_copies_the_hub_and_the_published_addresses_are_asked(
    spec: Callable[..., Spec], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[object, ...]] = []

    def load_dataset(path: str, **given: object) -> datasets.Dataset:
        asked.append((path, given["name"], given["split"]))
        return datasets.Dataset.from_list([{"n": number} for number in range(4)])

    def fetch(address: str) -> Path:
        asked.append((address.rpartition("LLM-Adapters/main/")[2],))
        return folder / "words.jsonl"

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("reft_cli.data.records.fetch", fetch)
    glue, math = spec({}, task="glue/mnli"), spec({}, task="arithmetic/gsm8k")
    assert (len(rows_of(glue, "train")), len(rows_of(glue, "validation")), len(rows_of(math, "train"))) == (4, 2, 4)
    assert asked == [
        ("nyu-mll/glue", "mnli", "train"),
        ("nyu-mll/glue", "mnli", "validation_matched"),
        ("openai/gsm8k", "main", "train[:-300]"),
    ]
    asked.clear()
    commonsense = spec({}, task="commonsense")
    assert len(rows_of(commonsense, "train")) == 4 and len(rows_of(commonsense, "test")) == 8 * 4
    assert asked[:2] == [("ft-training_set/commonsense_170k.json",), ("dataset/boolq/test.json",)]


def test_each_source_may_have_a_template(encoded: Callable[..., TrainingData]):
    own = {"prompt": "{text}?", "completion": " {label}", "reference": "{label}"}
    data = encoded(
        {"train": ["sums.train.jsonl", {"path": "words.jsonl", "template": own}], "template": TEMPLATE},
    )
    first, last = data.train.examples[0], data.train.examples[-1]
    assert (first.prompt, first.completion, first.reference, first.source) == ("Q: 0+1\nA:", " 1", None, "sums.train")
    assert (last.prompt, last.completion, last.reference, last.source) == ("word 3?", " yes", "yes", "words")


def test_where_one_source_has_a_template_each_needs_one(encoded: Callable[..., TrainingData]):
    with pytest.raises(SpecError) as caught:
        encoded({"train": ["sums.train.jsonl", {"path": "words.jsonl", "template": TEMPLATE}]})
    assert str(caught.value) == (
        "data.template: sums.train.jsonl: where one source has a template, each needs one with a prompt and a "
        "completion, its own or data.template"
    )


@pytest.mark.parametrize("other", [{"format": "text"}, {"columns": {"text": "a"}}])
def test_a_template_of_a_sources_own_names_its_columns_itself(spec: Callable[..., Spec], other: dict[str, Any]):
    with pytest.raises(SpecError, match=r"has no meaning where a source has a template of its own \(train\)"):
        spec({"train": {"path": "words.jsonl", "template": TEMPLATE}} | other)


def test_solved_rows_stand_before_every_prompt_and_are_not_trained_on(encoded: Callable[..., TrainingData]):
    data = {"train": "sums.train.jsonl", "validation": "sums.test.jsonl", "template": TEMPLATE}
    plain, shots = encoded(data), encoded(data | {"few_shot": 2})
    assert (len(plain.train.examples), len(shots.train.examples)) == (8, 6)
    prefix, _, question = shots.train.examples[0].prompt.rpartition("Q: ")
    solved = [f"{each.prompt}{each.completion}\n\n" for each in plain.train.examples]
    first, second = (next(text for text in solved if part in text) for part in prefix.split("\n\n")[:2])
    assert prefix == first + second and question.endswith("+1\nA:")
    assert shots.validation is not None
    assert all(each.prompt.startswith(prefix) for each in (*shots.train.examples, *shots.validation.examples))
    learned = {each.prompt.removeprefix(prefix) + each.completion + "\n\n" for each in shots.train.examples}
    assert learned == set(solved) - {first, second}
    assert encoded(data | {"few_shot": 2}).train.examples[0].prompt == shots.train.examples[0].prompt
    assert shots.fingerprints == plain.fingerprints


def test_braces_in_solved_rows_are_text(folder: Path, encoded: Callable[..., TrainingData]):
    rows = [{"q": "{x}", "a": "}"}, {"q": "{y}", "a": "}"}]
    (folder / "braces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = encoded({"train": "braces.jsonl", "template": TEMPLATE, "few_shot": 1})
    (example,) = data.train.examples
    assert example.prompt in ("Q: {x}\nA: }\n\nQ: {y}\nA:", "Q: {y}\nA: }\n\nQ: {x}\nA:")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"train": "sums.train.jsonl", "template": TEMPLATE, "few_shot": 8},
            "sums.train.jsonl: 8 solved rows for prompts leave none of 8 to train on",
        ),
        (
            {"train": "sums.train.jsonl", "template": TEMPLATE | {"reference": "{b}"}},
            "data.template.reference: `{b}` is no column; there are q, a",
        ),
    ],
)
def test_what_cannot_be(encoded: Callable[..., TrainingData], data: dict[str, Any], message: str):
    with pytest.raises(ReftError) as caught:
        encoded(data)
    assert str(caught.value) == message


def test_a_task_of_the_users_own_needs_no_python(folder: Path, tiny_llama: Path):
    """Template, extraction by a regular expression, several scored sources: from the spec alone, to the samples."""
    path = folder / "own.yaml"
    path.write_text(f"""
model: {{name: {tiny_llama}, device: cpu}}
task: {{metric: accuracy, extraction: {{pattern: "([a-z]+)", take: last, ignore_case: true}}}}
intervention: {{positions: l2}}
data:
  train: [{{path: sums.train.jsonl, template: {{prompt: "{{q}}=", completion: "{{a}}"}}}}, {{path: words.jsonl}}]
  test:
    - {{path: words.jsonl, name: words}}
    - {{path: sums.test.jsonl, name: sums, template: {{prompt: "{{q}}=", completion: "{{a}}", reference: "{{a}}"}}}}
  template: {{prompt: "{{text}}: ", completion: "it is {{label}}"}}
train: {{max_steps: 2, global_batch_size: 4}}
generation: {{max_new_tokens: 3}}
""")
    done = runs.train(load_spec(path), output=folder / "run", observer=NullObserver())
    report = runs.evaluate(done.run, observer=NullObserver())
    assert list(report.metrics) == ["accuracy", "accuracy/words", "accuracy/sums"]
    assert report.path is not None
    samples = [json.loads(line) for line in report.path.with_suffix(".samples.jsonl").read_text().splitlines()]
    assert [sample["reference"] for sample in samples] == ["no", "yes"] * 2 + ["1", "2", "3"]
    assert all(sample["answer"] in sample["prediction"] for sample in samples)
