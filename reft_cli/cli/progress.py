"""Progress on stderr: a live display on a terminal, plain lines elsewhere. Both are Observers and context managers."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from reft_cli.cli import console
from reft_cli.training.observer import EvaluationRecord, Level, StepRecord

if TYPE_CHECKING:
    from rich.console import Group
    from rich.progress import TaskID

LINE_EVERY = 10.0  # seconds between two plain lines of on_progress


class PlainProgress:
    """One line an event: `step 40/1200 loss 1.312 lr 9.0e-04 12.4k tok/s eta 6m`."""

    def __init__(self) -> None:
        self.unit = "step"
        self._began = self._said = time.monotonic()
        self._start = 0  # what was done before

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def on_start(self, steps: int, start_step: int, summary: Mapping[str, object]) -> None:
        """Say what begins."""
        self.unit = str(summary.get("unit", "step"))
        self._began = self._said = time.monotonic()
        self._start = start_step
        if "run" in summary:
            console.settings.run = Path(str(summary["run"]))
        console.say(_opening(steps, start_step, summary))

    def on_step(self, record: StepRecord) -> None:
        """Print the step's line."""
        console.say(step_line(record))

    def on_progress(self, done: int, total: int) -> None:
        """Print a line now and then; none for work that is over before the first would be due."""
        now = time.monotonic()
        if now - self._said >= LINE_EVERY and done:
            self._said = now
            console.say(f"{self.unit} {done:,}/{total:,} eta {duration(self.eta(done, total))}")

    def eta(self, done: int, total: int) -> float:
        """Seconds left, if the rest goes as what was done since on_start."""
        return (time.monotonic() - self._began) / max(done - self._start, 1) * (total - done)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Print the scores, while training; what `reft eval` finds is its result and goes to stdout."""
        if self.unit == "step":
            console.say(evaluation_line(record))

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Print the path with -v."""
        console.settings.run = path.parent.parent
        console.detail(f"checkpoint {path}")

    def on_message(self, level: Level, text: str) -> None:
        """Print the text as loud as its level."""
        {"debug": console.detail, "info": console.say, "warning": console.warn, "error": console.complain}[level](text)

    def on_end(self, reason: str) -> None:
        """Nothing: whoever started the work says how it ended."""


class LiveProgress(PlainProgress):
    """A bar with loss, learning rate, speed, time left, memory and the last validation; messages scroll above it."""

    def __init__(self) -> None:
        super().__init__()
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.text import Text

        stderr = console.rich_console(sys.stderr)
        eta = TextColumn("{task.fields[eta]}")
        columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), eta)
        self._bar = Progress(*columns, console=stderr, expand=True)
        self._task: TaskID | None = None
        self._status, self._scores = Text(style="dim"), Text(style="dim")
        self._live = Live(
            console=stderr,
            get_renderable=self._render,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,  # stdout belongs to the result
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()

    def _render(self) -> Group:
        from rich.console import Group

        lines = [text for text in (self._status, self._scores) if text.plain]
        return Group(*([self._bar] if self._task is not None else []), *lines)

    def _advance(self, done: int, total: int, eta: float) -> None:
        if self._task is None:
            self._task = self._bar.add_task(self.unit, total=total, eta="")
        self._bar.update(self._task, completed=done, total=total, eta=f"eta {duration(eta)}")

    def on_start(self, steps: int, start_step: int, summary: Mapping[str, object]) -> None:
        """Say what begins, above an empty bar."""
        super().on_start(steps, start_step, summary)
        self._task = self._bar.add_task(self.unit, total=steps, completed=start_step, eta="")

    def on_step(self, record: StepRecord) -> None:
        """Move the bar."""
        self._advance(record.step, record.steps, record.eta_seconds)
        self._status.plain = "  ".join(_facts(record))

    def on_progress(self, done: int, total: int) -> None:
        """Move the bar."""
        self._advance(done, total, self.eta(done, total))

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Print the scores, and keep them in sight."""
        self._scores.plain = evaluation_line(record)
        super().on_evaluation(record)


def progress(*, live: bool = True) -> PlainProgress:
    """The observer that fits stderr and the flags; to be used in a `with`.

    `live=False` for work that writes to stdout while it goes on, whose terminal a display would share.
    """
    return LiveProgress() if live and console.is_live() else PlainProgress()


def _opening(steps: int, start_step: int, summary: Mapping[str, object]) -> str:
    """`training: 1,200 steps, from step 40`; other facts of the summary follow."""
    unit = str(summary.get("unit", "step"))
    parts = [f"{steps:,} {unit}{'' if steps == 1 else 's'}"] + ([f"from {unit} {start_step:,}"] if start_step else [])
    parts += [f"{key.replace('_', ' ')} {value}" for key, value in summary.items() if key not in ("unit", "verb")]
    return f"{summary.get('verb', 'training')}: {', '.join(parts)}"


def step_line(record: StepRecord) -> str:
    """`step 40/1200 loss 1.312 lr 9.0e-04 12.4k tok/s eta 6m`, and the memory where it is known."""
    facts = " ".join(_facts(record))
    return f"step {record.step}/{record.steps} {facts} eta {duration(record.eta_seconds)}"


def _facts(record: StepRecord) -> list[str]:
    facts = [
        f"loss {record.loss:.3f}",
        f"lr {record.learning_rate:.1e}",
        f"{thousands(record.tokens_per_second)} tok/s",
    ]
    return [*facts, gibibytes(record.memory_bytes)] if record.memory_bytes is not None else facts


def evaluation_line(record: EvaluationRecord) -> str:
    """`validation at step 40: exact_match 0.912, loss 0.31 (best) in 2s`."""
    scores = ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
    best = " (best)" if record.best else ""
    return f"{record.split} at step {record.step}: {scores}{best} in {duration(record.seconds)}"


def duration(seconds: float) -> str:
    """12s, 6m, 1h05m: short, and as exact as one can believe."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{seconds:.0f}s"
    return f"{minutes}m" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def thousands(number: float) -> str:
    """834, 12.4k, 1.2M."""
    for limit, unit, size in ((1e6, "M", 1e6), (1e3, "k", 1e3)):
        if number >= limit:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def gibibytes(size: float) -> str:
    """7.9 GiB; below a tenth of one in MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.0f} MiB"
