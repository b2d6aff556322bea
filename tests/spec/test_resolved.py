"""resolved.yaml: every key with where it came from; it loads again to the same spec."""

from __future__ import annotations

from pathlib import Path

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_cli.spec.load import LoadedSpec, load_spec, resolved_yaml
from reft_cli.spec.schema import Spec

texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
) | st.sampled_from(
    [
        "yes",
        "1e-4",
        "010",
        "~",
        "a: b",
        "a # b",
        "${env:HOME}",
        "$${env:HOME}",
        "$$${env:",
        "null",
        "---",
        "{a}",
        "\n",
        "é",
    ]
)
templates = texts.map(lambda text: text.replace("{", "{{").replace("}", "}}") + "{question}")
fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)
positive = st.integers(1, 10**6)
sources = texts | st.fixed_dictionaries({"path": texts}, optional={"split": texts, "limit": positive})


def mapping(**optional):
    return st.fixed_dictionaries({}, optional=optional)


specs = st.fixed_dictionaries(
    {"model": texts | st.fixed_dictionaries({"name": texts}, optional={"revision": st.none() | texts})},
    optional={
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True),
        "intervention": mapping(
            method=st.sampled_from(["loreft", "noreft", "direft", "lobireft"]),
            layers=st.just("all") | st.lists(st.integers(0, 99), min_size=1, unique=True) | st.integers(0, 9),
            positions=st.sampled_from(["f7+l7", "l1", "all", "prompt"]),
            rank=st.none() | positive,
            dropout=fractions,
        )
        | st.just({"method": "red"}),
        "task": st.sampled_from(
            [{"kind": "regression"}, {"metric": "f1"}, {"kind": "classification", "labels": ["no", "1"]}]
        ),
        "data": st.fixed_dictionaries(
            {"train": sources},
            optional={
                "validation": fractions | sources,
                "columns": st.dictionaries(texts, texts, max_size=3),
                "template": st.just("chat") | st.fixed_dictionaries({"prompt": templates}),
            },
        ),
        "train": mapping(
            epochs=st.floats(0, 1e300, exclude_min=True) | positive,
            learning_rate=st.floats(0, 1e9, exclude_min=True),
            micro_batch_size=st.just("auto") | st.integers(1, 32),
            max_grad_norm=st.none() | fractions,
            deterministic=st.booleans(),
        ),
        "generation": mapping(stop=st.lists(texts, max_size=3), temperature=st.just(0.0) | st.floats(1e-4, 9)),
        "log": st.lists(st.sampled_from(["wandb", "tensorboard"]), max_size=2),
        "output": texts.map(lambda text: text.replace("{", "").replace("}", "") + "/{name}"),
    },
)


@settings(deadline=None, max_examples=60)
@given(specs)
def test_round_trip(tmp_path_factory, tree):
    spec = Spec.model_validate(tree)
    text = resolved_yaml(LoadedSpec(spec, Path("x.yaml"), "", {}))
    path = tmp_path_factory.getbasetemp() / "resolved.yaml"
    path.write_text(text)
    again = load_spec(path)
    assert again.spec == spec
    if "${env:" not in text:
        assert Spec.model_validate(yaml.safe_load(text)) == spec
    assert Spec.model_validate(spec.model_dump(mode="json")) == spec
    assert resolved_yaml(again).count("\n") == text.count("\n")


own = st.fixed_dictionaries(
    {"path": texts},
    optional={
        "local": texts,
        "share": st.just("glue") | positive | fractions,
        "weight": st.floats(0, 9, exclude_min=True),
        "name": texts,
        "template": st.fixed_dictionaries(
            {"prompt": templates},
            optional={"reference": templates, "replace": st.dictionaries(texts, texts, max_size=2)},
        ),
    },
)
extractions = st.sampled_from(["number", {"after": "a"}, {"pattern": "(a|b)", "take": "last", "remove": [","]}])


@settings(deadline=None, max_examples=60)
@given(train=own | st.lists(texts | own, min_size=1, max_size=3), shots=st.integers(0, 9), extraction=extractions)
def test_round_trip_of_mixes(tmp_path_factory, train, shots, extraction):
    data = {"train": train, "test": [{"path": "a"}, "b.csv"], "few_shot": shots}
    spec = Spec.model_validate({"model": "m", "task": {"extraction": extraction}, "data": data})
    path = tmp_path_factory.getbasetemp() / "mix.yaml"
    path.write_text(resolved_yaml(LoadedSpec(spec, Path("x.yaml"), "", {})))
    assert load_spec(path).spec == spec
    assert Spec.model_validate(spec.model_dump(mode="json")) == spec


def test_each_value_says_where_it_came_from(tmp_path):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/base.yaml").write_text("model: {name: m, dtype: float32}\ndata: {columns: {prompt: q}}\n")
    path = tmp_path / "train.yaml"
    path.write_text(
        "extends: [presets/base.yaml]\n"
        "intervention:\n  layers:\n    - 4\n    - 6\n"
        "data: {train: a.jsonl, columns: {completion: a}}\n"
        "train:\n  learning_rate: 1e-5\n"
    )
    flags = ["train.seed=3", "intervention.layers.0=2", "data.train.limit=5", 'generation.stop=["\\n# x"]']
    lines = [line.split() for line in resolved_yaml(load_spec(path, overrides=flags)).splitlines()]
    text = "\n".join(" ".join(line) for line in lines)
    for line in (
        "version: 1 # default",
        "extends: [] # merged",
        "name: m # presets/base.yaml:1",
        "dtype: float32 # presets/base.yaml:1",
        "layers: [2, 6] # train.yaml:3, --set intervention.layers.0=2",
        "path: a.jsonl # train.yaml:6",
        "limit: 5 # --set data.train.limit=5",
        "columns: {prompt: q, completion: a} # train.yaml:6, presets/base.yaml:2",
        "learning_rate: 1.0e-05 # train.yaml:8",
        "seed: 3 # --set train.seed=3",
        "rank: 4 # default",
        'stop: ["\\n# x"] # --set generation.stop=["\\n# x"]',
        "train:",
    ):
        assert f"\n{line}\n" in f"\n{text}\n"
    for line in lines:
        assert "#" in line or len(line) == 1  # a section's own line has no value, so nothing to say


def test_a_model_given_as_a_string(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {seed: 1}\nmodel: gpt2\n")
    text = resolved_yaml(load_spec(tmp_path / "a.yaml"))
    assert ["name:", "gpt2", "#", "a.yaml:2"] in [line.split() for line in text.splitlines()]
    assert ["extends:", "[]", "#", "default"] in [line.split() for line in text.splitlines()]
