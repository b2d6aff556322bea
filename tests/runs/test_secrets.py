"""Access tokens and secret variables stand in no file that a run writes about itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from reft_cli import runs
from reft_cli.cli.app import main
from reft_cli.environment import blotted
from reft_cli.errors import ReftError
from reft_cli.training.observer import NullObserver

HUB, OTHER = "hf_" + "a1B2" * 8, "correct-horse-battery"


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", HUB)
    monkeypatch.setenv("WANDB_API_KEY", OTHER)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-but-long")


def about(run: Path) -> str:
    """What a run says of itself; spec.yaml and resolved.yaml are the user's own words."""
    names = [path for path in run.rglob("*") if path.is_file() and path.name not in ("spec.yaml", "resolved.yaml")]
    return "\n".join(path.read_bytes().decode(errors="replace") for path in names)


def test_what_is_blotted_out(secrets: None):
    assert blotted(f"a {HUB} b {OTHER} c false-but-long") == "a *** b *** c false-but-long"
    assert blotted("hf_" + "Z" * 20 + " sk-" + "0" * 12) == "hf_*** sk-***"
    assert blotted("hf_ sk- token") == "hf_ sk- token"


def test_a_run_tells_no_secret(secrets: None, make_spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["reft", "train", "x.yaml", "--set", f"model.name={HUB}", OTHER])
    spec = make_spec("name=ok")
    object.__setattr__(spec, "text", f"{spec.text}# {HUB} {OTHER}\n")
    run = runs.train(spec, output=tmp_path / "run", observer=NullObserver()).run
    assert "model.name=***" in about(run)
    assert HUB not in about(run) and OTHER not in about(run)


def test_a_failed_run_tells_none_either(secrets: None, make_spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise ReftError(f"https://user:{OTHER}@host refused {HUB}")

    monkeypatch.setattr("reft_cli.evaluation.evaluate.Evaluator.run", fail)
    with pytest.raises(ReftError):
        runs.train(make_spec(), output=tmp_path / "run", observer=NullObserver())
    assert "user:***@host refused ***" in about(tmp_path / "run")
    assert HUB not in about(tmp_path / "run")


def test_a_report_of_a_bug_tells_none(secrets: None, spec_file: Path, tmp_path: Path, monkeypatch, capsys):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError(f"planted {HUB}")

    monkeypatch.setattr("reft_cli.evaluation.evaluate.Evaluator.run", broken)
    words = ["train", str(spec_file), "--output", str(tmp_path / "run"), "--set", f"name={OTHER}", "-q"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 1
    (report,) = (tmp_path / "run/logs").glob("reft-error-*.log")
    assert "planted ***" in report.read_text() and "name=***" in report.read_text()
    assert HUB not in about(tmp_path / "run") and OTHER not in about(tmp_path / "run")
    assert HUB not in capsys.readouterr().err
