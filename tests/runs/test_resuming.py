"""Runs that other versions began are taken up again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reft_cli import runs
from reft_cli.errors import CheckpointError
from reft_cli.spec.load import LoadedSpec
from reft_cli.training.observer import NullObserver

MakeSpec = Callable[..., LoadedSpec]


def test_keys_without_effect_are_as_if_they_were_not_there(make_spec: MakeSpec, tmp_path: Path):
    """`top_p` and `top_k` beside temperature 0, which specs may no longer have."""
    spec = make_spec("checkpoint.every=2", "checkpoint.keep=9")

    def begun(resume: str | None) -> int:
        return runs.train(spec, output=tmp_path / "run", resume=resume, observer=NullObserver()).step

    begun(None)
    file = tmp_path / "run/resolved.yaml"
    stored = file.read_text()
    assert "  temperature: 0" in stored and "  top_p: 1.0" in stored and "  top_k: 0" in stored
    file.write_text(stored.replace("top_p: 1.0", "top_p: 0.9").replace("top_k: 0", "top_k: 20"))
    assert begun("2") == 6
    assert runs.evaluate(tmp_path / "run", observer=NullObserver()).metrics
    file.write_text(stored.replace("temperature: 0", "temperature: -1"))
    with pytest.raises(CheckpointError, match="damaged: "):
        begun("2")
