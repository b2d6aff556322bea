"""Every spec in configs/ loads, says how it is run, and those of bundled parts pass `check`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reft_cli import runs
from reft_cli.interventions import METHODS
from reft_cli.spec.load import load_spec
from reft_cli.training.observer import NullObserver

ROOT = Path(__file__).parents[1] / "configs"
FILES = sorted(ROOT.rglob("*.yaml"))
BUNDLED = [path for path in FILES if path.parent.name != "hub"]


def test_there_are_specs():
    assert len(FILES) >= 11
    assert len(BUNDLED) >= 9


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_spec_loads_and_names_its_command(path: Path):
    spec = load_spec(path).spec
    assert spec.data.train is not None
    assert path.read_text().startswith(f"# reft train configs/{path.relative_to(ROOT)}\n")


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
