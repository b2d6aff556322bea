"""Every message of the loader, as golden files: NAME.yaml (its flags in its first comments) and NAME.txt beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from reft_cli.errors import SpecError, exit_code
from reft_cli.spec.load import load_spec

FOLDER = Path(__file__).parents[1] / "fixtures" / "spec" / "messages"
CASES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def flags_of(text: str) -> list[str]:
    return [line.removeprefix("# --set ") for line in text.splitlines() if line.startswith("# --set ")]


@pytest.fixture(autouse=True)
def in_folder(monkeypatch):
    monkeypatch.chdir(FOLDER)
    monkeypatch.delenv("REFT_TEST_NOPE", raising=False)


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    path = Path(f"{name}.yaml")
    with pytest.raises(SpecError) as caught:
        load_spec(path, overrides=flags_of(path.read_text()))
    assert str(caught.value) + "\n" == Path(f"{name}.txt").read_text()
    assert exit_code(caught.value) == 2


@pytest.mark.parametrize("name", CASES)
def test_each_problem_has_a_place_and_is_one_line(name):
    path = Path(f"{name}.yaml")
    with pytest.raises(SpecError) as caught:
        load_spec(path, overrides=flags_of(path.read_text()))
    for problem in caught.value.problems:
        assert problem.line or (problem.file or "").startswith("--set ")
        assert "\n" not in str(problem)
        assert str(problem).isprintable()


def test_no_golden_is_left_over():
    assert sorted(path.stem for path in FOLDER.glob("*.txt")) == CASES


def test_parts_of_a_problem():
    """What `--json` prints: file, line, column, key, message and the likeliest fix as a bare word."""
    with pytest.raises(SpecError) as caught:
        load_spec(Path("bad.yaml"))
    dtype, _, position, *_ = caught.value.problems
    assert (dtype.file, dtype.line, dtype.column, dtype.key, dtype.hint) == (
        "bad.yaml",
        4,
        3,
        "model.dtype",
        "bfloat16",
    )
    assert (position.key, position.hint) == ("intervention.position", "intervention.positions")
