"""`reft("eval", run)`: the program in this process, with its exit code and its two streams."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
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


Program = Callable[..., Done]


@pytest.fixture
def reft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
    for name in console.QUIET_LIBRARIES:
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that what main() sets is undone
        monkeypatch.delenv(name)
    if "transformers" in sys.modules:  # imported before main() could make it quiet
        monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)

    def run(*words: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        streams = capsys.readouterr()
        return Done(int(end.value.code or 0), streams.out, streams.err)

    return run
