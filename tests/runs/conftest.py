"""A tiny spec on a tiny random model, and an observer that remembers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from reft_cli import runs
from reft_cli.spec.load import LoadedSpec, load_spec
from reft_cli.training.observer import EvaluationRecord, NullObserver, StepRecord

WORDS = ("good", "bad", "fine", "poor", "warm", "cold")


@dataclass
class Remembering(NullObserver):
    """Keeps what it is told."""

    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self.evaluations.append(record)

    def on_checkpoint(self, step: int, path: Path) -> None:
        self.checkpoints.append(step)

    def on_message(self, level: str, text: str) -> None:
        self.messages.append(text)


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Short texts, a yes/no label and a number."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(1, 5))]
        good = words[-1] in ("good", "fine", "warm")
        made.append({"text": " ".join(words), "label": "yes" if good else "no", "score": float(len(words))})
    return made


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl (20 rows), validation.jsonl (6) and test.jsonl (7)."""
    folder = tmp_path_factory.mktemp("data")
    for split, count, seed in (("train", 20, 0), ("validation", 6, 1), ("test", 7, 2)):
        lines = [json.dumps(row) for row in rows(count, seed)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


SPEC = """\
model: {{name: {model}, device: cpu}}
intervention: {{method: loreft, positions: f2+l2, rank: 2}}
task: {{kind: causal_lm}}
data:
  train: {data}/train.jsonl
  validation: {data}/validation.jsonl
  test: {data}/test.jsonl
  template: {{prompt: "{{text}} ->", completion: " {{label}}"}}
train: {{epochs: 2, learning_rate: 1.0e-2, global_batch_size: 8, log_every: 1}}
generation: {{max_new_tokens: 4}}
"""


@pytest.fixture(scope="session")
def spec_file(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, data_dir: Path) -> Path:
    """tiny.yaml."""
    path = tmp_path_factory.mktemp("spec") / "tiny.yaml"
    path.write_text(SPEC.format(model=tiny_llama, data=data_dir))
    return path


@pytest.fixture(scope="session")
def trained(spec_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of the tiny spec with `--set` texts on top; each is trained once and not to be changed."""
    runs_there: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in runs_there:
            path = tmp_path_factory.mktemp("trained") / "run"
            runs.train(load_spec(spec_file, overrides=overrides), output=path, observer=NullObserver())
            runs_there[overrides] = path
        return runs_there[overrides]

    return run


@pytest.fixture
def make_spec(spec_file: Path) -> Callable[..., LoadedSpec]:
    """Loads the tiny spec, with `--set` texts on top."""

    def load(*overrides: str) -> LoadedSpec:
        return load_spec(spec_file, overrides=overrides)

    return load


@pytest.fixture
def observer() -> Remembering:
    return Remembering()
