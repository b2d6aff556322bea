"""The architecture, held by tests: who may import whom, size, docstrings, and a command line that starts light."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "reft_cli"
ROWS = (
    {"errors"},
    {"positions", "layers", "bundled", "environment", "modelcard", "suites", "parallel", "reading", "writing", "kinds"},
    {"spec", "interventions"},
    {"models"},
    {"checkpoint", "data", "runfolder"},
    {"tasks"},
    {"training", "generation"},
    {"evaluation"},
    {"runs"},
    {"cli"},
)
RANK = {name: rank for rank, names in enumerate(ROWS) for name in names}
OUTSIDE = {"__init__", "__main__"}  # the version, which all may read, and `python -m reft_cli`
HEAVY = ("torch", "transformers", "accelerate", "datasets", "pandas", "numpy", "sklearn", "scipy")
LIGHT = (*HEAVY, "pydantic", "yaml", "rich")  # what even `reft --help` has no need for
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The name in RANK that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Rooms of reft_cli that a module imports anywhere, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "reft_cli":
            names = [f"reft_cli.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("reft_cli.") and "__" not in name)


def upward(path: Path, tree: ast.AST) -> list[str]:
    """Imports of a module that do not go down."""
    here = room(path)
    return [
        f"{path.name}: {here} must not import {there}"
        for there in imports(tree)
        if there != here and RANK[there] >= RANK[here]
    ]


def parsed() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def test_every_module_is_seen_and_has_a_rank():
    assert len(MODULES) >= 25
    assert {room(path) for path in MODULES} - OUTSIDE <= set(RANK)


def test_imports_go_down():
    wrong = [line for path, tree in parsed().items() if room(path) not in OUTSIDE for line in upward(path, tree)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    ["from reft_cli import runs", "import reft_cli.cli.app", "def f():\n    from reft_cli.runfolder import find"],
)
def test_an_upward_import_would_be_seen(line):
    assert upward(PACKAGE / "checkpoint.py", ast.parse(line))


def test_files_have_at_most_500_lines():
    files = [path for folder in ("reft_cli", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) >= 30
    long = {str(path.relative_to(ROOT)): count for path in files if (count := len(path.read_text().splitlines())) > 500}
    assert not long


def test_every_module_says_what_it_is_for():
    silent = [str(path.relative_to(ROOT)) for path, tree in parsed().items() if not ast.get_docstring(tree)]
    assert not silent


def test_functions_have_at_most_60_lines():
    functions = [
        (f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1)
        for path, tree in parsed().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert len(functions) >= 100
    assert not [function for function in functions if function[1] > 60]


def test_test_files_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_the_command_line_starts_light():
    code = (
        "import contextlib, io, sys\n"
        "from reft_cli.cli.app import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(['--help'])\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "typer" in loaded and "reft_cli" in loaded
    assert not loaded & set(LIGHT)


def test_help_is_quick():
    fastest, out = float("inf"), ""
    for _ in range(3):
        start = time.perf_counter()
        out = subprocess.run(
            [sys.executable, "-m", "reft_cli", "--help"], capture_output=True, text=True, check=True
        ).stdout
        fastest = min(fastest, time.perf_counter() - start)
    assert "Usage: reft" in out
    assert fastest < 1.0  # 0.1 s on a quiet machine; the bound leaves room for a busy one
