"""What the README shows is what there is: the quickstart's spec, specs that load, commands, options, links, scripts."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from reft_cli.cli.app import app
from reft_cli.spec.load import load_spec

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "configs/README.md", "scripts/bench/RESULTS.md")
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", "\n".join(TEXTS.values()), flags=re.MULTILINE | re.DOTALL)
SPECS = [text for kind, text in BLOCKS if kind == "yaml"]
COMMANDS = [
    shlex.split(line, comments=True)
    for kind, text in BLOCKS
    if kind in ("console", "bash")
    for line in re.findall(r"(?:^\$ |\$\(|^)(reft [^)|>\n]*)", text, flags=re.MULTILINE)
]
LINKS = [(page, link) for page, text in TEXTS.items() for link in re.findall(r"\]\(([^):]+)\)", text)]
SCRIPTS = re.findall(r"^python (scripts/\S+)((?:.*\\\n)*.*)", "\n".join(TEXTS.values()), flags=re.MULTILINE)

PROGRAM: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group of commands


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page; code blocks have none."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_quickstart_is_shown_as_it_is():
    assert SPECS[0] == (ROOT / "configs/quickstart.yaml").read_text(encoding="utf-8")


def test_the_two_scripts_come_first():
    kind, text = BLOCKS[0]
    assert kind == "bash"
    assert [line.split("#")[0].strip() for line in text.splitlines()] == [
        "bash scripts/quickstart.sh",
        "bash scripts/test.sh",
    ]


def test_there_are_specs_commands_links_and_scripts():
    assert len(SPECS) == 6
    assert len(COMMANDS) >= 20
    assert len(LINKS) >= 40
    assert len(SCRIPTS) == 2


@pytest.mark.parametrize("text", SPECS[1:], ids=["hub model", "own task", "suite", "pairs", "every section"])
def test_specs_load(text: str, tmp_path: Path):
    (tmp_path / "base.yaml").write_text("train: {log_every: 5}\n")
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    assert load_spec(path).spec.model.name == "Qwen/Qwen3-0.6B"


def test_the_examples_of_sections_make_a_spec(tmp_path: Path):
    table = README[README.index("| section | says |") :].split("\n\n", 1)[0]
    lines = []
    for row in table.splitlines()[2:]:
        names, _, examples = row.strip("| ").split(" | ")
        found = (re.findall("`(.*?)`", each) for each in (names, examples))
        lines += [f"{name}: {example}\n" for name, example in zip(*found, strict=True)]
    assert len(lines) >= 12
    (tmp_path / "base.yaml").write_text("train: {log_every: 5}\n")
    (tmp_path / "spec.yaml").write_text("".join(lines))
    assert load_spec(tmp_path / "spec.yaml").spec.train.log_every == 5


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_and_options_exist(words: list[str]):
    command = PROGRAM[words[1]]
    command = getattr(command, "commands", {}).get(words[2], command)
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words[2:] if re.match(r"--?[a-z]", word)} <= known


@pytest.mark.parametrize(("page", "link"), LINKS, ids=str)
def test_links_lead_somewhere(page: str, link: str):
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists()
    assert not anchor or anchor in anchors(target)


@pytest.mark.parametrize(("script", "words"), SCRIPTS, ids=[script for script, _ in SCRIPTS])
def test_options_of_scripts_exist(script: str, words: str):
    text = (ROOT / script).read_text(encoding="utf-8")
    assert {option for option in re.findall(r"--[a-z-]+", words) if option not in text} == set()


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "python"])
def test_what_python_imports_is_there(text: str):
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        module = importlib.import_module(str(node.module))
        assert all(hasattr(module, alias.name) for alias in node.names)


def test_every_command_is_in_the_table():
    assert {name for name in PROGRAM if f"`reft {name}" not in README} == set()
