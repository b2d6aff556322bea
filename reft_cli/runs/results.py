"""Results of evaluations: the report, its name in a run's eval/ folder, and what is written there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from reft_cli.environment import versions
from reft_cli.errors import CheckpointError
from reft_cli.evaluation.evaluate import Evaluation
from reft_cli.generation.settings import Decoding
from reft_cli.reading import read_json
from reft_cli.runfolder import RunFolder
from reft_cli.runs.sources import names_a_split
from reft_cli.writing import json_line, json_text, write_atomic

Base = Literal["none", "compare", "only"]
SAMPLE = ("row", "prompt", "reference", "rejected")  # what is kept of a sample besides predictions
PASSES: dict[Base, list[str]] = {"none": ["run"], "compare": ["base", "run"], "only": ["base"]}


@dataclass(frozen=True)
class EvalReport:
    """Scores on one set of rows; `metrics` is empty if only the base was scored."""

    run: Path
    checkpoint: Path
    data: str
    rows: int
    metric: str
    metrics: dict[str, float]
    base_metrics: dict[str, float]
    seconds: float
    path: Path | None
    """The result file, if the checkpoint lies in a run folder."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for --json and the result file."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def scored_as(data: str | None, split: str, name: str) -> str:
    """What a result is called after: a split of the run's own data, a file, or a set and its split."""
    stem = split if data is None else Path(name).stem
    return stem if data is None or names_a_split(data) or stem == split else f"{stem}-{split}"


def changed_settings(own: Decoding, decoding: Decoding) -> list[str]:
    """Settings that are not the run's own, as words of a result's name; how fast answers come does not count."""
    before, now = asdict(own), asdict(decoding)
    other = {key: value for key, value in now.items() if key != "compile" and value != before[key]}
    return [f"{key}_{_digest(repr(value)) if key == 'stop' else value}" for key, value in other.items()]


def result_name(scored: str, step: int, *, base: Base, limit: int | None, changed: Sequence[str]) -> str:
    """What was scored, what was left out, and how else answers were decoded."""
    parts = [scored, f"step_{step:06d}", *["base"] * (base == "only"), *([f"first_{limit}"] if limit else []), *changed]
    return "-".join(parts)


def kept_apart(run: RunFolder | None, name: str, data: str) -> str:
    """The name, with a mark of the data where other data of that name have been scored under it."""
    if run is None:
        return name
    path = run.evaluation(name)
    try:
        there = read_json(path) if path.exists() else None
    except CheckpointError:  # damaged; it is written anew
        there = None
    before = there.get("data", data) if isinstance(there, dict) else data
    return name if before == data else f"{name}-{_digest(data)}"


def keep(
    run: RunFolder, report: EvalReport, results: dict[str, Evaluation], *, name: str, facts: dict[str, Any]
) -> EvalReport:
    """Write the result and the samples into the run folder; rows of both models stand side by side."""
    path = run.evaluation(name)
    samples = []
    for index, sample in enumerate(next(iter(results.values())).samples):
        both = {which: result.samples[index].get("prediction") for which, result in results.items()}
        line: dict[str, Any] = {key: sample[key] for key in SAMPLE if key in sample}
        if "run" in both:
            line["prediction"] = both["run"]
        if "base" in both:
            line["base_prediction"] = both["base"]
        for which, result in results.items():
            if "answer" in result.samples[index]:
                line["answer" if which == "run" else "base_answer"] = result.samples[index]["answer"]
        samples.append(line)
    write_atomic(run.evaluation(name, suffix=".samples.jsonl"), "".join(map(json_line, samples)))
    kept = replace(report, path=path)
    facts = facts | {"versions": versions()}
    write_atomic(path, json_text(kept.to_dict() | facts))
    return kept


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
