"""2,000 specs, mutated from a seed: whatever stands in the file, the answer is a spec or a SpecError with a place."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from reft_cli.errors import SpecError, exit_code
from reft_cli.spec.load import load_spec, resolved_yaml
from reft_cli.spec.schema import Spec

SPEC = """\
extends: [base.yaml]
model: {name: m, dtype: auto}
intervention:
  method: loreft
  layers: "4;6;10"
  positions: f7+l7
  rank: 4
  dropout: 0.05
task: {kind: classification, labels: ["no", "yes"]}
data:
  train: {path: rows.jsonl, split: "train[:10]"}
  validation: 0.1
  columns: {text: review}
  template:
    prompt: "Review: {text}"
train:
  epochs: 3
  learning_rate: 9e-4
  micro_batch_size: auto
  seed: ${env:REFT_TEST_NOPE:-42}
checkpoint: {best: f1, patience: 3}
generation: {stop: ["\\n"], temperature: 0.7, top_p: 0.9}
log: [tensorboard]
output: runs/{name}
"""
SCALARS = """0 -1 1e999 .nan .inf -.inf 010 0o17 0xffff 1_000 1:30 true no ~ null "" '4' f7l7 auto all [] {} [1,a] *x
{a:1} &x !!int !x << ? | > @ % ` ${env:REFT_TEST_NOPE} ${env:} $${env:x} "\\ud800" "\\0" 2026-01-02 """.split()
SCALARS += ["9" * 400, "x" * 300, "[" * 50, "&a [*a, *a]", "a: b", "{{", '"\\U00110000"', "\t", "é", "\u2028", "\x07"]


def lines_of(text):
    return text.splitlines(keepends=True) or ["\n"]


def delete_line(rng, text):
    lines = lines_of(text)
    del lines[rng.randrange(len(lines))]
    return "".join(lines)


def repeat_line(rng, text):
    lines = lines_of(text)
    lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    return "".join(lines)


def swap_lines(rng, text):
    lines = lines_of(text)
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return "".join(lines)


def indent_line(rng, text):
    lines = lines_of(text)
    at = rng.randrange(len(lines))
    lines[at] = rng.choice([" ", "   ", "\t", "- "]) + lines[at] if rng.random() < 0.6 else lines[at].lstrip()
    return "".join(lines)


def change_value(rng, text):
    lines = lines_of(text)
    at = rng.randrange(len(lines))
    key, colon, _ = lines[at].partition(":")
    lines[at] = f"{key}{colon} {rng.choice(SCALARS)}\n"
    return "".join(lines)


def misspell(rng, text):
    words = [at for at, ch in enumerate(text) if ch.isalpha()]
    if not words:
        return text
    at = rng.choice(words)
    return text[:at] + rng.choice(["", text[at] * 2, "x", "_", "-", "é", '"', "'"]) + text[at + 1 :]


def insert_token(rng, text):
    at = rng.randrange(len(text) + 1)
    token = rng.choice(
        [*SCALARS, "&x ", "*x", "!!map ", "<<: *x\n", "---\n", "...\n", "#", ": ", "- ", "{", "}", "[", "]"]
    )
    return text[:at] + token + text[at:]


def cut(rng, text):
    a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    return text[:a] + text[min(b, a + rng.randrange(1, 200)) :]


BREAKING = (delete_line, repeat_line, swap_lines, indent_line, change_value, misspell, insert_token, cut)
KEEPING = (delete_line, change_value, change_value, change_value, misspell)  # mostly still YAML


def mutate(rng, text):
    mutations = rng.choice([BREAKING, KEEPING])
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        text = rng.choice(mutations)(rng, text)
    content = bytearray(text.encode())
    if rng.random() < 0.1 and content:
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def check(error):
    assert exit_code(error) == 2
    assert error.problems
    for problem in error.problems:
        assert problem.line or problem.key, problem
        assert "\n" not in str(problem)
        str(problem).encode()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REFT_TEST_NOPE", raising=False)
    (tmp_path / "base.yaml").write_text("model: base\ntrain: {max_steps: 10}\n")
    return tmp_path


def test_mutated_files(folder):
    rng = random.Random(20240613)
    good = keyed = 0
    for number in range(2000):
        path = Path(f"{number % 7}.yaml")
        path.write_bytes(mutate(rng, SPEC))
        try:
            loaded = load_spec(path)
        except SpecError as error:
            check(error)
            keyed += any(problem.key for problem in error.problems)
        else:
            good += 1
            if number % 20 == 0:
                assert Spec.model_validate(loaded.spec.model_dump()) == loaded.spec
                assert resolved_yaml(loaded)
    assert good > 150  # the mutations neither spare nor ruin everything
    assert keyed > 600


def test_mutated_flags(folder):
    rng = random.Random(20240614)
    (folder / "spec.yaml").write_text("model: m\nintervention: {layers: [1, 2]}\n")
    keys = [
        "model",
        "model.name",
        "train.seed",
        "intervention.layers",
        "data.train.path",
        "train",
        "log.0",
        "a.b.c",
        "",
        ".",
    ]
    for _ in range(400):
        flag = rng.choice(keys) + rng.choice(["=", "=", "=", "", "==", ".x="]) + rng.choice(SCALARS)
        try:
            load_spec(Path("spec.yaml"), overrides=[flag])
        except SpecError as error:
            for problem in error.problems:
                assert problem.file
                assert problem.file.startswith(("--set ", "spec.yaml"))
                assert "\n" not in str(problem)


SUITE_SPEC = """\
model: m
task: {suite: glue/mrpc, recipe: large, kind: classification}
intervention:
  method: direft
  rank: 2
data:
  folder: there
  train: [{path: a.jsonl, weight: 2}, b.jsonl]
  test: {limit: 5}
  columns: {text: review}
  few_shot: 0
train:
  epochs: 3
checkpoint: {best: f1}
"""
SUITE_FLAGS = ["task", "task.suite", "task.kind", "task.recipe", "task.labels", "intervention.method", "data.train"]
SUITE_FLAGS += ["data.template", "data.test.path", "data.train.0.path", "data", "intervention.rank", "data.few_shot"]


def test_a_mistake_is_never_blamed_on_the_suite(folder):
    rng = random.Random(20240616)
    words = [*SCALARS, "red", "regression", "commonsense", "glue/stsb", "loreft", "causal_lm", "base", "[{path: a}]"]
    good = conflicts = 0
    for number in range(400):
        path = Path(f"s{number % 3}.yaml")
        path.write_bytes(mutate(rng, SUITE_SPEC) if number % 2 else SUITE_SPEC.encode())
        flags = [f"{rng.choice(SUITE_FLAGS)}={rng.choice(words)}" for _ in range(rng.randrange(3))]
        try:
            loaded = load_spec(path, overrides=flags)
        except SpecError as error:
            check(error)
            assert not [str(problem) for problem in error.problems if str(problem).startswith("suite ")]
            conflicts += any("is of suite" in (problem.hint or "") for problem in error.problems)
        else:
            good += 1
            if number % 10 == 0:
                Path("resolved.yaml").write_text(resolved_yaml(loaded))
                assert load_spec(Path("resolved.yaml")).spec == loaded.spec
    assert good > 40 and conflicts
