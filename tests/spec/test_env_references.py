"""`${env:NAME}` and its default."""

from __future__ import annotations

import pytest

from reft_cli.errors import SpecError
from reft_cli.spec.environment import escape
from reft_cli.spec.load import load_spec


@pytest.fixture
def value_of(tmp_path, monkeypatch):
    """The value of a key after loading a spec that writes it so."""
    monkeypatch.setenv("REFT_TEST_SEED", "7")
    monkeypatch.setenv("REFT_TEST_NAME", "org/model")
    monkeypatch.setenv("REFT_TEST_EMPTY", "")
    monkeypatch.delenv("REFT_TEST_NOPE", raising=False)

    def read(key, written):
        section, _, name = key.partition(".")
        given = {"model": {"name": "m"}} | ({section: {}} if section != "model" else {})
        given[section][name] = written
        path = tmp_path / "spec.yaml"
        path.write_text(
            "\n".join(f"{s}:\n" + "\n".join(f"  {k}: {v}" for k, v in ks.items()) for s, ks in given.items())
        )
        return getattr(getattr(load_spec(path).spec, section), name)

    return read


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("train.seed", "${env:REFT_TEST_SEED}", 7),
        ("train.seed", "${env:REFT_TEST_NOPE:-42}", 42),
        ("train.learning_rate", "${env:REFT_TEST_NOPE:-1e-4}", 1e-4),
        ("train.max_steps", "${env:REFT_TEST_NOPE:-}", None),
        ("train.max_steps", "${env:REFT_TEST_EMPTY}", None),
        ("train.deterministic", "${env:REFT_TEST_NOPE:-true}", True),
        ("intervention.layers", "${env:REFT_TEST_SEED}", [7]),
        ("model.name", "${env:REFT_TEST_NAME}", "org/model"),
        ("model.name", '"${env:REFT_TEST_SEED}"', "7"),
        ("model.name", "'${env:REFT_TEST_SEED}'", "7"),
        ("model.name", "x${env:REFT_TEST_SEED}", "x7"),
        ("model.name", "${env:REFT_TEST_SEED}${env:REFT_TEST_NOPE:-a:b}", "7a:b"),
        ("model.name", "a$${env:REFT_TEST_SEED}", "a${env:REFT_TEST_SEED}"),
        ("model.name", "$${env:REFT_TEST_SEED}", "${env:REFT_TEST_SEED}"),
        ("model.name", "${HOME}", "${HOME}"),
        ("model.name", "$5", "$5"),
    ],
)
def test_substitution(value_of, key, written, value):
    assert value_of(key, written) == value
    assert type(value_of(key, written)) is type(value)


@pytest.mark.parametrize(
    ("key", "written", "message"),
    [
        ("train.seed", '"${env:REFT_TEST_SEED}"', '`"7"` is not a whole number'),
        ("train.seed", "${env:REFT_TEST_NAME}", "`org/model` is not a whole number"),
        ("model.name", "${env:REFT_TEST_SEED}", "`7` is not text; put it in quotes"),
        ("train.seed", "${env:REFT_TEST_NOPE}", r"environment variable REFT_TEST_NOPE is not set \(write"),
        ("model.name", "a${env:REFT_TEST_NOPE}b", "environment variable REFT_TEST_NOPE is not set"),
        ("model.name", "${env:a-b}", "is no reference"),
    ],
)
def test_refusals(value_of, key, written, message):
    with pytest.raises(SpecError, match=message):
        value_of(key, written)


def test_bytes_that_are_no_text(value_of, monkeypatch):
    monkeypatch.setenv("REFT_TEST_NAME", "a\udcffb")  # how Python shows the byte 0xff
    with pytest.raises(SpecError, match=r"`a\\udcffb` holds half a character, or is not UTF-8"):
        value_of("model.name", "${env:REFT_TEST_NAME}")


def test_what_is_replaced_later_is_not_looked_up(tmp_path, monkeypatch):
    monkeypatch.delenv("REFT_TEST_NOPE", raising=False)
    (tmp_path / "spec.yaml").write_text("model: m\ntrain:\n  seed: ${env:REFT_TEST_NOPE}\n")
    assert load_spec(tmp_path / "spec.yaml", overrides=["train.seed=3"]).spec.train.seed == 3


def test_an_unset_variable_hides_no_other_problem(tmp_path, monkeypatch):
    monkeypatch.delenv("REFT_TEST_NOPE", raising=False)
    (tmp_path / "spec.yaml").write_text("model: ${env:REFT_TEST_NOPE}\ntrain: {epochs: 0}\n")
    with pytest.raises(SpecError) as caught:
        load_spec(tmp_path / "spec.yaml")
    assert [problem.key for problem in caught.value.problems] == ["model", "train.epochs"]


def test_escape_is_undone_by_reading(value_of):
    assert value_of("model.name", f"'{escape('${env:A} $${env:B}')}'") == "${env:A} $${env:B}"
