"""What is bundled reaches the wheel: it lies inside the package, and no ignore rule (builds obey them) hides it."""

import subprocess
import tomllib
from pathlib import Path

import pytest

from reft_cli.bundled import ROOT, locate, names

REPOSITORY = Path(__file__).parents[2]


def test_the_wheel_takes_the_whole_package():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert settings == {"packages": ["reft_cli"]}
    assert all(locate(name).is_relative_to(REPOSITORY / "reft_cli") for name in names())


def test_no_ignore_rule_hides_a_bundled_file():
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a checkout")
    files = [str(path) for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", *files], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (ignored.returncode, ignored.stdout) == (1, "")


def test_each_bundled_folder_has_a_card():
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert {path.name for path in folders} == {"tiny-llama", "reviews"}
    assert all((path / "README.md").read_text().startswith("---\n") for path in folders)
