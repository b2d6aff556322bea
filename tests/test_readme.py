"""What the README shows is what there is: the quickstart's spec, specs that load, commands and options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from reft_cli.cli.app import app
from reft_cli.spec.load import load_spec

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
SPECS = [text for kind, text in BLOCKS if kind == "yaml"]
COMMANDS = [
    shlex.split(line, comments=True)
    for kind, text in BLOCKS
    if kind in ("console", "bash")
    for line in re.findall(r"(?:^\$ |\$\(|^)(reft [^)|>\n]*)", text, flags=re.MULTILINE)
]

PROGRAM: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group of commands


def test_the_quickstart_is_shown_as_it_is():
    assert SPECS[0] == (ROOT / "configs/quickstart.yaml").read_text(encoding="utf-8")


def test_there_are_specs_and_commands():
    assert len(SPECS) == 5
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("text", SPECS[1:], ids=["every section", "hub model", "suite", "pairs"])
def test_specs_load(text: str, tmp_path: Path):
    (tmp_path / "base.yaml").write_text("train: {log_every: 5}\n")
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    assert load_spec(path).spec.model.name == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_and_options_exist(words: list[str]):
    command = PROGRAM[words[1]]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words[2:] if word.startswith("--")} <= known


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(link: str):
    assert (ROOT / link).exists()


def test_every_command_is_in_the_table():
    assert {name for name in PROGRAM if f"`reft {name}" not in README} == set()
