"""Going on with a run: whether its spec allows it, from which checkpoint, and what is forgotten on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from reft_cli.checkpoint import Checkpoint, read_checkpoint, read_training_state
from reft_cli.errors import CheckpointError, DataError, SpecError
from reft_cli.runfolder import RunFolder, step_of
from reft_cli.spec.load import load_spec
from reft_cli.spec.quoting import printable
from reft_cli.spec.schema import Spec
from reft_cli.training.observer import Observer
from reft_cli.training.state import Progress

FREE = (
    "version",
    "extends",
    "name",
    "output",
    "log",
    "parallel",
    "checkpoint",
    "evaluation.every",  # and not its limit, which says what scores are of
    "generation",
    "model.device",
    "model.device_map",
    "model.max_memory",
    "data.folder",  # the rows have fingerprints
    "data.test",
    "train.epochs",
    "train.max_steps",
    "train.micro_batch_size",
    "train.log_every",
    "train.diverge_factor",
    "train.gradient_checkpointing",
)
SHOWN = 200  # characters of a value in a message


def check_same_run(run: RunFolder, spec: Spec, fingerprints: Mapping[str, str], observer: Observer) -> None:
    """Compare with what the run was begun with.

    SpecError: a key changed that would change the result. DataError: the rows changed. Other changes are told.
    """
    if not (run.resolved.exists() or run.checkpoints()):
        return  # killed before it had written its spec
    begun = begun_with(run)
    changed = list(differences(begun.model_dump(), spec.model_dump()))
    refused = [text for key, text in changed if not _is_free(key)]
    if refused:
        raise SpecError(
            f"{run.path} was begun with other settings, so it cannot go on: {'; '.join(refused)}. "
            "Put them back, or start a new run with --name."
        )
    for _, text in changed:
        observer.on_message("info", f"changed since the run was begun: {text}")
    known = run.read().get("data", {})
    for split, fingerprint in fingerprints.items():
        before = known.get(split, {}).get("fingerprint")
        if before not in (None, fingerprint):
            raise DataError(
                f"data.{split}: its rows have changed since {run.path} was begun; start a new run with --name"
            )


# Older versions took other values beside temperature 0, where they do nothing.
WITHOUT_SAMPLING = ("generation.top_p=1.0", "generation.top_k=0")


def begun_with(run: RunFolder) -> Spec:
    """The spec that a run was begun with. CheckpointError: its file is damaged."""
    generation = run.read_spec().get("generation")  # refuses what is no plain file of ours
    sampled = not isinstance(generation, dict) or generation.get("temperature") != 0
    try:
        return load_spec(run.resolved, overrides=() if sampled else WITHOUT_SAMPLING).spec
    except SpecError as error:
        raise CheckpointError(f"{run.resolved}: damaged: {error.problems[0].message}") from error


@dataclass(frozen=True)
class Start:
    """A checkpoint, with all that training needs to go on from it."""

    checkpoint: Checkpoint
    tensors: dict[str, Tensor]
    progress: Progress
    refused: CheckpointError | None = None
    """What is wrong with a newer checkpoint that was passed over."""


def starting_point(run: RunFolder, which: str) -> Start | None:
    """Where to go on: a step, or `last`, the newest whole checkpoint; None for `last` of a run that has none yet.

    CheckpointError: there is none of that name, or it is damaged, for `last` as all before it are.
    """
    if which != "last":
        return _start_from(run.select(which))
    newest = step_of(run.select(which)) if run.checkpoints() else 0
    refused: CheckpointError | None = None
    for path in reversed([path for path in run.checkpoints() if step_of(path) <= newest]):
        try:
            return replace(_start_from(path), refused=refused)
        except CheckpointError as error:
            refused = refused or error
    if refused is not None:
        raise refused
    return None


def _start_from(path: Path) -> Start:
    checkpoint = read_checkpoint(path)
    tensors, state = read_training_state(checkpoint)
    try:
        progress = TypeAdapter(Progress).validate_json(json.dumps(state), strict=True)
    except ValidationError as error:
        raise CheckpointError(_changed(checkpoint, ".".join(map(str, error.errors()[0]["loc"])))) from error
    if unknown := state.keys() - vars(progress).keys():
        raise CheckpointError(_changed(checkpoint, min(unknown)))
    if progress.step != checkpoint.manifest.step or not progress.recent_losses:
        raise CheckpointError(_changed(checkpoint, "step"))
    return Start(checkpoint, tensors, progress)


def _changed(checkpoint: Checkpoint, key: str) -> str:
    return f"{checkpoint.path}: its training state is of another version, or was changed: {printable(key)}"


def rewind(run: RunFolder, start: Start | None) -> None:
    """Make the folder what it was at the starting point. Killed at any moment, the same start can be had again."""
    if start is not None:
        run.link("last", start.checkpoint.path)
        best = start.progress.best_step
        if best is not None and run.checkpoint(best).is_dir():
            run.link("best", run.checkpoint(best))
    step = start.progress.step if start else 0
    run.truncate_metrics(after=step, validated=start is None or not start.progress.validation_is_due)
    run.forget(after=step)


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def differences(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """(key, "key: old -> new") of every value that differs; long ones are cut off."""
    for key in dict.fromkeys((*before, *after)):
        old, new, where = before.get(key), after.get(key), f"{path}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{where}.")
        elif old != new:
            key_text, before_text, after_text = (printable(str(each), limit=SHOWN) for each in (where, old, new))
            yield where, f"{key_text}: {before_text} -> {after_text}"
