"""What a loop tells those who watch it: records and the Observer protocol.

The loop and the evaluation call an observer; a terminal, a tracker or a test is one. Nothing here knows tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Level = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True)
class StepRecord:
    """One log event of training."""

    step: int
    """Optimizer steps done."""
    steps: int
    """Optimizer steps of the whole run."""
    epoch: float
    loss: float
    """Nats per answer token, or the task's own loss: the mean over the steps since the last event, up to a hundred."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Tokens seen so far, padding left out."""
    seconds: float
    """Spent training so far, earlier attempts included."""
    tokens_per_second: float
    eta_seconds: float
    memory_bytes: int | None = None
    """Peak of the device; None where it is not measured."""


@dataclass(frozen=True)
class EvaluationRecord:
    """The scores of one pass over a split."""

    step: int
    split: str
    metrics: Mapping[str, float]
    seconds: float
    best: bool
    """Whether this is the best checkpoint so far."""


class Observer(Protocol):
    """Who watches: training calls on_step, evaluation and inference on_progress, and both all the others."""

    def on_start(self, steps: int, start_step: int, summary: Mapping[str, object]) -> None:
        """Work begins at `start_step` of `steps`.

        `summary` is what may be shown: `run` the run folder, `verb` what is done (training), `unit` of what (step).
        """

    def on_step(self, record: StepRecord) -> None:
        """A log event of training."""

    def on_progress(self, done: int, total: int) -> None:
        """`done` of `total` units are through, in work that has no steps; cheap enough to be called for every batch."""

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """A split has been scored."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint is complete on disk."""

    def on_message(self, level: Level, text: str) -> None:
        """Something to be said in words."""

    def on_end(self, reason: str) -> None:
        """Work has ended: `finished`, `patience`, `interrupted`, `failed`, ..."""


class NullObserver:
    """Watches and says nothing."""

    def on_start(self, steps: int, start_step: int, summary: Mapping[str, object]) -> None:
        """Nothing."""

    def on_step(self, record: StepRecord) -> None:
        """Nothing."""

    def on_progress(self, done: int, total: int) -> None:
        """Nothing."""

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Nothing."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Nothing."""

    def on_message(self, level: Level, text: str) -> None:
        """Nothing."""

    def on_end(self, reason: str) -> None:
        """Nothing."""
