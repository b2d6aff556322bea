"""`extends`: what wins, who is blamed, where it stops."""

from __future__ import annotations

import pytest

from reft_cli.errors import SpecError
from reft_cli.spec.layering import LONGEST_CHAIN
from reft_cli.spec.load import load_spec


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Writes {path: text}."""
    monkeypatch.chdir(tmp_path)

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return write


def problems(path, **more):
    with pytest.raises(SpecError) as caught:
        load_spec(path, **more)
    return str(caught.value).splitlines()


def test_mappings_merge_lists_and_scalars_replace(folder):
    folder(
        {
            "a.yaml": "model: {name: a, revision: v1}\nintervention: {layers: [1, 2], rank: 8}\nlog: [wandb]\n",
            "b.yaml": "train: {seed: 1, epochs: 1}\nintervention: {rank: 16}\n",
            "spec.yaml": "extends: [a.yaml, b.yaml]\nintervention: {layers: [3]}\ntrain: {seed: 2}\n",
        }
    )
    loaded = load_spec("spec.yaml")
    spec = loaded.spec
    assert (spec.model.name, spec.model.revision, spec.log, spec.extends) == ("a", "v1", ["wandb"], [])
    assert (spec.intervention.layers, spec.intervention.rank) == ([3], 16)  # the later file wins over the earlier
    assert (spec.train.seed, spec.train.epochs) == (2, 1)
    assert loaded.text.startswith("extends:")
    places = {key: (origin.file, origin.line) for key, origin in loaded.origins.items()}
    assert places["intervention", "rank"] == ("b.yaml", 2)
    assert places["intervention", "layers"] == places["intervention", "layers", 0] == ("spec.yaml", 2)
    assert places["train", "epochs"] == ("b.yaml", 1)
    assert places["model", "revision"] == ("a.yaml", 1)
    assert ("extends",) not in places


@pytest.mark.parametrize(
    ("below", "above", "name", "dtype"),
    [
        ("{name: a, dtype: float16}", "b", "b", "auto"),  # a string is the whole model
        ("a", "{dtype: float32}", "a", "float32"),  # a mapping is a part of it
        ("a", "b", "b", "auto"),
        ("{name: a, dtype: float16}", "{name: b}", "b", "float16"),
    ],
)
def test_a_model_as_string_and_as_mapping(folder, below, above, name, dtype):
    folder({"base.yaml": f"model: {below}\n", "spec.yaml": f"extends: [base.yaml]\nmodel: {above}\n"})
    model = load_spec("spec.yaml").spec.model
    assert (model.name, model.dtype) == (name, dtype)


def test_paths_count_from_the_file_that_names_them(folder):
    folder(
        {
            "specs/train.yaml": "extends: [../presets/a.yaml]\n",
            "presets/a.yaml": "extends: [deep/b.yaml]\nmodel: m\n",
            "presets/deep/b.yaml": "train: {seed: 5}\n",
        }
    )
    assert load_spec("specs/train.yaml").spec.train.seed == 5


def test_the_file_that_sets_a_value_is_blamed(folder):
    folder(
        {
            "spec.yaml": "extends: [a.yaml, b.yaml]\ntrain: {epochs: -1}\n",
            "a.yaml": "model: m\ntrain:\n  seed: x\n  epochs: y\n",
            "b.yaml": "train: {schedule: cosin, warmup: 3}\nmodel: m\nmodel: n\n",
        }
    )
    assert problems("spec.yaml", overrides=["train.log_every=0"]) == [
        "spec.yaml:2:9: train.epochs: `-1` is not a number above 0",
        "a.yaml:3:3: train.seed: `x` is not a whole number of at least 0 and below 4294967296",
        "b.yaml:1:9: train.schedule: `cosin` is not one of linear, cosine, constant; did you mean `cosine`?",
        "b.yaml:1:26: train.warmup: unknown key; did you mean `train.warmup_ratio`?",
        "b.yaml:3:1: model: key given twice (first on line 2)",
        "--set train.log_every=0: train.log_every: `0` is not a whole number of at least 1",
    ]


def test_a_scalar_over_a_section_is_blamed_on_its_file(folder):
    folder({"spec.yaml": "extends: [a.yaml]\ntrain: fast\n", "a.yaml": "model: m\ntrain: {seed: 1}\n"})
    assert problems("spec.yaml")[0].startswith("spec.yaml:2:1: train: `fast` is not a mapping")


def test_cycles(folder):
    folder(
        {
            "a.yaml": "extends: [b.yaml]\nmodel: m\n",
            "b.yaml": "train: {seed: 1}\nextends:\n  - sub/../c.yaml\n",
            "c.yaml": "extends: [a.yaml]\n",
            "sub/x": "",
            "self.yaml": "model: m\nextends: [self.yaml]\n",
        }
    )
    expected = "c.yaml:1:11: extends: extends itself: a.yaml -> b.yaml -> sub/../c.yaml -> sub/../a.yaml"
    assert problems("a.yaml") == ["sub/../" + expected]
    assert problems("self.yaml") == ["self.yaml:2:11: extends: extends itself: self.yaml -> self.yaml"]


def test_a_file_may_be_reached_twice(folder):
    folder(
        {
            "spec.yaml": "extends: [a.yaml, b.yaml]\n",
            "a.yaml": "extends: [root.yaml]\ntrain: {seed: 1}\n",
            "b.yaml": "extends: [root.yaml]\n",
            "root.yaml": "model: m\ntrain: {seed: 0}\n",
        }
    )
    assert load_spec("spec.yaml").spec.train.seed == 0  # b.yaml, with all below it, comes after a.yaml


def test_doubling_files_are_read_once(folder):
    """Thirty files that each name the one before twice would be a billion readings."""
    folder(
        {"f0.yaml": "model: m\n"} | {f"f{i}.yaml": f"extends: [f{i - 1}.yaml, f{i - 1}.yaml]\n" for i in range(1, 19)}
    )
    assert load_spec("f18.yaml").spec.model.name == "m"


def test_a_chain_without_end(folder):
    folder({f"f{i}.yaml": f"extends: [f{i + 1}.yaml]\nmodel: m\n" for i in range(LONGEST_CHAIN + 5)})
    last = LONGEST_CHAIN - 1
    assert problems("f0.yaml") == [f"f{last}.yaml:1:11: extends: a chain of more than {LONGEST_CHAIN} files"]


def test_files_that_cannot_be_read(folder):
    folder(
        {
            "spec.yaml": "extends:\n- base.yml\n- broken.yaml\n- folder\n- empty.yaml\ntrain: {seed: 1, seed: 2}\n",
            "base.yaml": "model: m\n",
            "broken.yaml": "model: {name: m\n",
            "folder/x.yaml": "",
            "empty.yaml": "",
        }
    )
    assert problems("spec.yaml") == [  # and nothing about a missing model: what stands in those files is not known
        "spec.yaml:2:3: extends: base.yml: no such file; did you mean `base.yaml`?",
        "spec.yaml:4:3: extends: folder: a folder; a spec is a file, such as `folder/x.yaml`",
        "spec.yaml:6:18: train.seed: key given twice (first on line 6)",
        "broken.yaml:1:8: the bracket that opens here is never closed",
        "empty.yaml:1:1: the file holds no keys; a spec needs at least `model:`",
    ]


@pytest.mark.parametrize("given", ["base.yaml", "{a: b}", "3", "[3]", "[[a]]", ""])
def test_extends_is_a_list(folder, given):
    folder({"spec.yaml": f"model: m\nextends: {given}\n"})
    assert problems("spec.yaml") == [
        "spec.yaml:2:1: extends: a list of at most 20 files is needed; write `extends: [base.yaml]`"
    ]


def test_variables_in_extends(folder, monkeypatch):
    monkeypatch.setenv("REFT_TEST_PRESET", "base")
    monkeypatch.delenv("REFT_TEST_NOPE", raising=False)
    folder({"spec.yaml": 'extends: ["${env:REFT_TEST_PRESET}.yaml"]\n', "base.yaml": "model: m\n"})
    assert load_spec("spec.yaml").spec.model.name == "m"
    folder({"spec.yaml": "extends:\n  - ${env:REFT_TEST_NOPE}\n"})
    assert problems("spec.yaml")[0].startswith(
        "spec.yaml:2:5: extends.0: environment variable REFT_TEST_NOPE is not set"
    )
