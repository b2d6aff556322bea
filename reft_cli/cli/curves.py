"""Curves of a run's metrics: read from metrics.jsonl, drawn in the terminal, or as a picture by matplotlib."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_cli.errors import SpecError, reason_of

if TYPE_CHECKING:
    from reft_cli.runfolder import RunFolder

Curve = Sequence[tuple[int, float]]  # (step, value), by rising steps
VALIDATION = "validation_"
HEIGHT, WIDTH = 6, 60  # of a curve in the terminal, in characters
KINDS = (".png", ".svg", ".pdf")
PANEL = (5.0, 3.4)  # inches


def curves_of(run: RunFolder) -> dict[str, Curve]:
    """Curves by name: the training loss, then each validation score; those of a few steps are short, none is empty."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in run.read_metrics():
        for key, value in line.items():
            if key == "loss" or key.startswith(VALIDATION):
                if isinstance(value, int | float) and math.isfinite(value):
                    found.setdefault(key.replace("_", " ", 1), []).append((int(line["step"]), float(value)))
    return {
        name: sorted(dict(points).items()) for name, points in sorted(found.items(), key=lambda each: each[0] != "loss")
    }


def drawn(name: str, curve: Curve, *, height: int = HEIGHT, width: int = WIDTH) -> list[str]:
    """Lines of text: the name, a curve with its largest and smallest value beside it, and its steps below.

    Of several points in one column their mean is drawn.
    """
    steps, values = [step for step, _ in curve], [value for _, value in curve]
    width = min(width, len(curve))
    columns: list[list[float]] = [[] for _ in range(width)]
    for step, value in curve:
        columns[_place(step, steps[0], steps[-1], width)].append(value)
    low, high = min(values), max(values)
    grid = [[" "] * width for _ in range(height)]
    for column, there in enumerate(columns):
        if there:
            grid[height - 1 - _place(sum(there) / len(there), low, high, height)][column] = _dot()
    top, bottom = f"{high:.4g}", f"{low:.4g}"
    wide = max(len(top), len(bottom))
    edges = [top, *[""] * (height - 2), bottom]
    lines = [f"{edge:>{wide}} | {''.join(row)}".rstrip() for edge, row in zip(edges, grid, strict=True)]
    ends = f"step {steps[0]:,}" + (f" to {steps[-1]:,}" if len(steps) > 1 else "")
    return [name, *lines, f"{'':>{wide}}   {ends}"]


def _place(value: float, low: float, high: float, count: int) -> int:
    """Which of `count` equal parts of low to high a value lies in."""
    return 0 if high <= low else min(count - 1, int((value - low) / (high - low) * count))


def _dot() -> str:
    """A dot that stdout's encoding has."""
    try:
        "•".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "*"
    return "•"


def write_picture(path: Path, runs: Mapping[str, Mapping[str, Curve]]) -> None:
    """A panel for each curve, with a line for each run. SpecError: no matplotlib, or a file that cannot be written."""
    if path.suffix.lower() not in KINDS:
        raise SpecError(f"--output {path}: the name has to end in {', '.join(KINDS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise SpecError("reft runs plot needs matplotlib: pip install 'reft[plot]'")
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    across = math.ceil(math.sqrt(len(names)))
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(PANEL[0] * across, PANEL[1] * down), layout="constrained")
    for index, name in enumerate(names):
        _panel(figure.add_subplot(down, across, index + 1), name, runs)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise SpecError(f"--output {path}: cannot be written ({reason_of(error)})") from error


def _panel(axes: Any, name: str, runs: Mapping[str, Mapping[str, Curve]]) -> None:  # noqa: ANN401  matplotlib's Axes
    for run, curves in runs.items():
        if name in curves:
            steps, values = zip(*curves[name], strict=True)
            axes.plot(steps, values, label=run, marker="o" if len(steps) < 20 else None, markersize=3)
    axes.set_title(name)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if len(runs) > 1:
        axes.legend(fontsize="small")
