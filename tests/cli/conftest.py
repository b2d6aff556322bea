"""`reft("eval", run)`: the program in this process, with its exit code and its two streams."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from reft_cli.cli import console
from reft_cli.cli.app import main


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.out.count("\n") == 1, "a JSON result is one line"
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.err)["error"]


SPEC = """\
model: {model}
intervention: {{positions: f2+l2, rank: 2}}
data: {{train: rows.jsonl, validation: rows.jsonl, test: rows.jsonl}}
train: {{epochs: 2, global_batch_size: 4, learning_rate: 1.0e-2, log_every: 1}}
generation: {{max_new_tokens: 3}}
checkpoint: {{every: 1, keep: 9}}
"""

Program = Callable[..., Done]


@pytest.fixture
def reft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
    for name in (*console.QUIET_LIBRARIES, *console.BARS):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that what main() sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)  # imported before main() could make it quiet

    def run(*words: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        streams = capsys.readouterr()
        return Done(int(end.value.code or 0), streams.out, streams.err)

    return run


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with s.yaml, rows.jsonl and a finished run in runs/s."""
    folder, before = tmp_path_factory.mktemp("project"), Path.cwd()
    rows = [{"prompt": f"{word}? ", "completion": word} for word in ("aa", "bb", "cc", "dd") * 2]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "x" * 600, "completion": "y"}) + "\n")
    (folder / "s.yaml").write_text(SPEC.format(model=tiny_llama))
    os.chdir(folder)
    with pytest.raises(SystemExit) as end:
        main(["train", "s.yaml", "-q"])
    os.chdir(before)
    assert not end.value.code
    return folder


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, which is the working directory."""
    shutil.copytree(project, tmp_path / "p", symlinks=True)
    monkeypatch.chdir(tmp_path / "p")
    return tmp_path / "p"
