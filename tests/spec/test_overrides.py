"""`--set key.path=value`."""

from __future__ import annotations

import pytest

from reft_cli.spec.load import load_spec

SPEC = """\
model: base
intervention: {layers: [1, 2], rank: 8}
data: {train: rows.jsonl, columns: {prompt: q}}
train:
  seed: 1
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


@pytest.mark.parametrize(
    ("flag", "keys", "value"),
    [
        ("train.seed=3", "train.seed", 3),
        (" train.seed =3", "train.seed", 3),
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("generation.stop=[no, '1']", "generation.stop", ["no", "1"]),
        ("model=gpt2", "model.name", "gpt2"),
        ("model.name=gpt2", "model.name", "gpt2"),
        ("model.dtype=float32", "model.name", "base"),
        ("model={name: gpt2, dtype: float32}", "model.dtype", "float32"),
        ("data.train.limit=10", "data.train.path", "rows.jsonl"),
        ("data.train=other.jsonl", "data.train", "other.jsonl"),
        ("data.template={prompt: 'Q: {q} = ', completion: '{a}'}", "data.template.prompt", "Q: {q} = "),
        ('data.columns={"my.key": a=b}', "data.columns", {"my.key": "a=b"}),
        ("data.columns.completion=a", "data.columns", {"prompt": "q", "completion": "a"}),
        ("intervention.layers=0-15/2", "intervention.layers", "0-15/2"),
        ("intervention.layers=5", "intervention.layers", [5]),
        ("intervention.layers.1=7", "intervention.layers", [1, 7]),
        ("intervention.rank=", "intervention.rank", 4),  # null: the default of the method
        ("train.max_steps=null", "train.max_steps", None),
        ("output=runs/${env:REFT_TEST_NOPE:-x}", "output", "runs/x"),
    ],
)
def test_set(path, flag, keys, value):
    found = load_spec(path, overrides=[flag]).spec
    for key in keys.split("."):
        found = getattr(found, key)
    assert found == value
    assert type(found) is type(value)


def test_the_last_one_wins_and_is_the_origin(path):
    loaded = load_spec(
        path, overrides=["train.seed=3", "intervention.layers.0=0", "train.seed=4", "model.dtype=float32"]
    )
    assert loaded.spec.train.seed == 4
    assert loaded.spec.intervention.layers == [0, 2]
    flags = {key: origin.flag for key, origin in loaded.origins.items() if origin.flag}
    assert flags == {
        ("train", "seed"): "--set train.seed=4",
        ("intervention", "layers", 0): "--set intervention.layers.0=0",
        ("model", "dtype"): "--set model.dtype=float32",
    }
    assert loaded.origins["model", "name"].line == 1
