"""The suites as data: every one makes a valid spec for every method, and holds the numbers that were published."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from reft_cli.errors import SpecError
from reft_cli.spec.data import SourceSpec
from reft_cli.spec.load import load_spec, resolved_yaml
from reft_cli.spec.schema import Method, Spec
from reft_cli.spec.suite_text import preset_yaml
from reft_cli.suites import SUITES, preset

METHODS = get_args(Method)
RECIPES = [(suite.name, each.method, each.name) for suite in SUITES.values() for each in suite.recipes]


def spec_of(folder: Path, text: str, *sets: str) -> Spec:
    path = folder / "spec.yaml"
    path.write_text(text)
    return load_spec(path, overrides=sets).spec


def test_how_many_there_are():
    assert len(SUITES) == 28 and len(RECIPES) == 121
    assert all(name == suite.name for name, suite in SUITES.items())


@pytest.mark.parametrize("method", METHODS)
def test_every_suite_makes_a_spec_for_every_method(tmp_path: Path, method: str):
    for name, suite in SUITES.items():
        spec = spec_of(tmp_path, f"model: m\ntask: {name}\nintervention: {{method: {method}}}\n")
        assert (spec.task.suite, spec.intervention.method) == (name, method)
        assert spec.data.train is not None and spec.data.test is not None
        known = suite.recipes_of(method)
        assert spec.task.recipe == (known[0].name if known else None)
        assert spec.train.weight_decay == 0


@pytest.mark.parametrize(("name", "method", "recipe"), RECIPES)
def test_every_recipe_can_be_copied_as_yaml(tmp_path: Path, name: str, method: str, recipe: str):
    chosen = preset(SUITES[name], method=method, recipe=recipe)
    assert chosen is not None and all(each.source for each in chosen.defaults)
    by_name = spec_of(
        tmp_path, f"model: m\ntask: {{suite: {name}, recipe: {recipe}}}\nintervention: {{method: {method}}}\n"
    )
    copied = spec_of(tmp_path, preset_yaml(chosen, method=method), "model.name=m")
    forgotten = by_name.task.model_copy(update={"suite": None, "recipe": None})
    assert copied == by_name.model_copy(update={"task": forgotten})


@pytest.mark.parametrize("name", ["commonsense", "arithmetic/gsm8k", "instruct", "glue/stsb"])
def test_the_resolved_spec_loads_to_the_same(tmp_path: Path, name: str):
    path = tmp_path / "spec.yaml"
    path.write_text(f"model: m\ntask: {name}\ntrain: {{epochs: 1}}\n")
    loaded = load_spec(path)
    again = tmp_path / "resolved.yaml"
    again.write_text(resolved_yaml(loaded))
    assert load_spec(again).spec == loaded.spec


def numbers(spec: Spec) -> tuple[Any, ...]:
    edit, train = spec.intervention, spec.train
    where = (edit.layers, edit.positions, edit.rank, edit.tied, edit.dropout)
    return (*where, train.learning_rate, train.warmup_ratio, train.epochs, train.global_batch_size)


@pytest.mark.parametrize(
    ("task", "method", "expected"),
    [
        ("commonsense", "loreft", ("all", "f7+l7", 8, True, 0.0, 9e-4, 0.1, 6, 32)),
        ("{suite: commonsense, recipe: 3-epochs}", "loreft", ("all", "f7+l7", 8, True, 0.0, 9e-4, 0.1, 3, 16)),
        ("commonsense/boolq", "loreft", ("all", "f7+l7", 8, True, 0.0, 9e-4, 0.1, 6, 32)),
        ("commonsense", "direft", ("all", "f7+l7", 4, False, 0.05, 9e-4, 0.0, 6, 32)),
        ("{suite: arithmetic, recipe: tied}", "direft", ("all", "f7+l7", 8, True, 0.05, 9e-4, 0.0, 12, 32)),
        ("arithmetic", "loreft", ("all", "f7+l7", 8, True, 0.0, 9e-4, 0.1, 12, 32)),
        ("arithmetic/gsm8k", "loreft", ("all", "f7+l7", 8, True, 0.0, 9e-4, 0.1, 12, 32)),
        ("instruct", "loreft", ([3, 9, 18, 24], "f5+l5", 4, False, 0.0, 9e-4, 0.0, 9, 128)),
        ("{suite: instruct, recipe: half}", "loreft", ([3, 9, 18, 24], "f5+l5", 2, False, 0.0, 9e-4, 0.0, 9, 128)),
        ("instruct", "red", ("all", "all", None, True, 0.0, 2e-5, 0.1, 3, 128)),
        ("preference/truthfulqa", "loreft", ([18, 28], "f1+l1", 4, True, 0.0, 1e-3, 0.0, 3, 10)),
        ("reward/synthetic_instruct", "loreft", ("all", "f1+l1", 1, False, 0.0, 5e-5, 0.0, 1, 256)),
        ("glue/sst2", "loreft", ("all", "f3", 1, True, 0.1, 6e-4, 0.1, 40, 32)),
        ("{suite: glue/cola, recipe: large}", "loreft", ("all", "f3", 1, True, 0.2, 1e-4, 0.2, 30, 32)),
        ("glue/rte", "direft", ("all", "f1", 1, True, 0.0, 9e-4, 0.0, 60, 8)),
        ("{suite: glue/qqp, recipe: large}", "direft", ("all", "f7", 1, True, 0.05, 9e-4, 0.1, 20, 32)),
        ("glue/rte", "red", ("all", "all", None, True, 0.0, 8e-3, 0.06, 40, 32)),
        ("{suite: glue/mrpc, recipe: large}", "red", ("all", "all", None, True, 0.0, 2e-3, 0.0, 20, 32)),
    ],
)
def test_the_published_numbers(tmp_path: Path, task: str, method: str, expected: tuple[Any, ...]):
    assert numbers(spec_of(tmp_path, f"model: m\ntask: {task}\nintervention: {{method: {method}}}\n")) == expected


@pytest.mark.parametrize(
    ("task", "width", "layers", "expected"),
    [("commonsense", 4096, 32, 2_097_408), ("glue/sst2", 768, 12, 18_444), ("instruct", 4096, 32, 262_176)],
)
def test_the_published_parameter_counts(tmp_path: Path, task: str, width: int, layers: int, expected: int):
    edit = spec_of(tmp_path, f"model: m\ntask: {task}\n").intervention
    groups = 1 if edit.tied or "+" not in edit.positions else 2
    sites = groups * (layers if edit.layers == "all" else len(edit.layers))
    assert edit.rank is not None and sites * (2 * width * edit.rank + edit.rank) == expected


def test_a_method_without_a_recipe_follows_its_relative(tmp_path: Path):
    text = "model: m\ntask: glue/sst2\nintervention: {method: direft_orthogonal}\n"
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    loaded = load_spec(path)
    assert numbers(loaded.spec) == numbers(spec_of(tmp_path, text.replace("direft_orthogonal", "direft")))
    assert "suite glue/sst2 (ReFT paper; published for direft)" in resolved_yaml(loaded)


def test_red_without_a_recipe_keeps_its_own_edit(tmp_path: Path):
    spec = spec_of(tmp_path, "model: m\ntask: commonsense\nintervention: {method: red}\n")
    assert (spec.intervention.component, spec.intervention.positions, spec.train.epochs) == ("mlp_output", "all", 6)
    path = tmp_path / "spec.yaml"
    assert "nothing is published for red" in load_spec(path).preset.notes[-1]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("data: {train: mine.jsonl}", "mine.jsonl"),
        ("data: {train: {path: mine.jsonl}}", {"path": "mine.jsonl"}),
        ("data: {folder: f, train: {local: mine}}", {"local": "mine"}),
        ("data: {folder: f, train: {local: mine, split: a}}", {"local": "mine", "split": "a"}),
        ("data: {train: {limit: 5}}", {"path": "nyu-mll/glue", "subset": "sst2", "local": "glue/sst2", "limit": 5}),
        (
            "data: {train: [a.jsonl, {path: b.csv, weight: 2}]}",
            [{"path": "a.jsonl"}, {"path": "b.csv", "weight": 2}],
        ),
    ],
)
def test_a_source_of_the_users_own_is_no_part_of_the_suites(tmp_path: Path, given: str, expected: Any):
    train = spec_of(tmp_path, f"model: m\ntask: glue/sst2\n{given}\n").data.train
    if isinstance(expected, list):
        assert [each.model_dump(exclude_defaults=True) for each in train] == expected  # type: ignore[union-attr]
    elif isinstance(expected, dict):
        of_the_suite = {"split": "train"} if "limit" in expected else {}
        assert train.model_dump(exclude_defaults=True) == expected | of_the_suite  # type: ignore[union-attr]
    else:
        assert train == expected


def test_a_name_in_a_folder_that_is_not_given_is_no_silent_return_to_the_suites_rows(tmp_path: Path):
    with pytest.raises(SpecError) as caught:
        spec_of(tmp_path, "model: m\ntask: glue/sst2\ndata: {train: {local: mine}}\n")
    (problem,) = caught.value.problems
    assert str(problem).endswith("data.train.local: `mine` is a name in data.folder, which is not given")


def test_a_source_of_the_users_own_leaves_prompt_and_scoring(tmp_path: Path):
    mine = spec_of(
        tmp_path, "model: m\ntask: commonsense\ndata: {folder: f, train: {local: mine}, test: {local: mine}}\n"
    )
    suite = spec_of(tmp_path, "model: m\ntask: commonsense\n")
    assert (mine.data.template, mine.task, mine.train) == (suite.data.template, suite.task, suite.train)
    assert mine.data.test == SourceSpec(local="mine")


def test_keys_of_a_source_reach_each_of_the_suites_sources(tmp_path: Path):
    suite = spec_of(tmp_path, "model: m\ntask: commonsense\n").data.test
    some = spec_of(tmp_path, "model: m\ntask: commonsense\ndata: {test: {limit: 5}}\n").data.test
    assert isinstance(suite, list) and len(suite) == 8
    assert some == [each.model_copy(update={"limit": 5}) for each in suite]


def test_a_template_with_its_own_answer_is_no_part_of_the_suites(tmp_path: Path):
    text = "model: m\ntask: commonsense\ndata: {template: {prompt: 'Q: {q}', completion: '{a}'}}\n"
    template = spec_of(tmp_path, text).data.template
    assert template.model_dump(exclude_defaults=True) == {"prompt": "Q: {q}", "completion": "{a}"}  # type: ignore[union-attr]
    text = "model: m\ntask: commonsense\ndata: {template: {prompt: 'Q: {instruction}'}}\n"
    assert spec_of(tmp_path, text).data.template.reference == "{answer}"  # type: ignore[union-attr]


def test_a_format_of_the_users_own_has_its_own_columns(tmp_path: Path):
    data = spec_of(tmp_path, "model: m\ntask: glue/sst2\ndata: {format: pair, columns: {text_pair: b}}\n").data
    assert data.columns == {"text_pair": "b"}
    assert spec_of(tmp_path, "model: m\ntask: glue/sst2\n").model.dropout is True


def test_a_suite_lies_below_extended_files_and_flags(tmp_path: Path):
    (tmp_path / "base.yaml").write_text("task: glue/rte\ntrain: {epochs: 5}\n")
    text = "model: m\nextends: [base.yaml]\ntask: {metric: f1}\n"
    spec = spec_of(tmp_path, text)
    assert (spec.task.suite, spec.task.metric, spec.train.epochs, spec.train.learning_rate) == (
        "glue/rte",
        "f1",
        5,
        9e-4,
    )
    spec = spec_of(tmp_path, text, "task.suite=glue/cola", "train.epochs=1")
    assert (spec.task.suite, spec.task.metric, spec.train.epochs, spec.train.learning_rate) == (
        "glue/cola",
        "f1",
        1,
        4e-4,
    )
    spec = spec_of(tmp_path, text, "task=classification")
    assert (spec.task.suite, spec.task.kind, spec.task.metric) == (None, "classification", "accuracy")
