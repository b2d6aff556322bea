"""Every spec in configs/ loads, says how it is run, and those of bundled parts pass `check`."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path

import pytest
import torch

from reft_cli import runs
from reft_cli.interventions import METHODS
from reft_cli.spec.load import load_spec
from reft_cli.training.observer import NullObserver

ROOT = Path(__file__).parents[1] / "configs"
FILES = sorted(ROOT.rglob("*.yaml"))
BUNDLED = [path for path in FILES if load_spec(path).spec.model.name.startswith("bundled:")]
PUBLISHED = [path for path in FILES if path.parent.name in ("commonsense", "arithmetic", "instruct", "glue")]
MEASURED = re.compile(r"^# (Measured( here)?: |A starting point)", flags=re.MULTILINE)


def test_there_are_specs():
    assert len(FILES) == 65
    assert len(BUNDLED) == 14
    assert len(PUBLISHED) == 46


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_spec_loads_and_names_its_command_and_what_was_measured(path: Path):
    spec = load_spec(path).spec
    assert spec.data.train is not None
    command, *lines = path.read_text().splitlines()
    assert command == f"# reft train configs/{path.relative_to(ROOT)}"
    header = list(takewhile(lambda line: line.startswith("# "), lines))
    assert path.parent.name == "debug" or MEASURED.search("\n".join(header))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_published_recipe_says_what_it_is(path: Path):
    loaded = load_spec(path)
    assert loaded.preset is not None and loaded.preset.suite.name.startswith(path.parent.name)
    assert loaded.spec.name is not None and loaded.spec.name.split("_")[0] in (path.parent.name, "gsm8k")
    text = path.read_text()
    assert MEASURED.search(text) and ("# The paper's row: " in text) != ("# A starting point" in text)
    if "# The paper's row: " in text:
        recipe = loaded.preset.recipe
        assert recipe is not None and recipe.method == loaded.spec.intervention.method
        assert loaded.spec.model.name in recipe.model.split(", ")
        _, replaced = loaded.of_the_suite
        assert replaced in ([], ["task.recipe"])


def test_run_names_are_distinct():
    names = [name for path in FILES if (name := load_spec(path).spec.name)]
    assert len(names) == len(set(names)) == len(PUBLISHED)


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: str(path.relative_to(ROOT)))
def test_bundled_spec_passes_check(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("reft_cli.runs.estimate.QUICK", 0.0)
    report = runs.check(load_spec(path))
    assert report.warnings == []
    assert report.model is not None and report.model.percent < 1


@pytest.mark.parametrize("method", METHODS)
def test_the_quickstart_trains_and_reloads_with_every_method(method: str, tmp_path: Path):
    small = ("data.train.limit=32", "data.validation.limit=8", "train.max_steps=2")
    loaded = load_spec(ROOT / "quickstart.yaml", overrides=[f"intervention.method={method}", *small])
    result = runs.train(loaded, output=tmp_path / "run", observer=NullObserver())
    with runs.open_run(result.run, checkpoint="last") as session:
        assert session.checkpoint.manifest.intervention.method == method
        assert all(
            torch.equal(session.model.trainable_state()[name], tensor)
            for name, tensor in session.checkpoint.tensors.items()
        )
        (answer,) = session.answer(["The film is good."], settings={})
    assert answer.tokens <= 4
