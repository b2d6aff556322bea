"""Whether a run may go on under a spec: what changed, and whether that would change its result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from reft_cli.errors import DataError, SpecError
from reft_cli.runfolder import RunFolder
from reft_cli.spec.load import load_spec
from reft_cli.spec.schema import Spec
from reft_cli.training.observer import Observer

FREE = (
    "version",
    "extends",
    "name",
    "output",
    "log",
    "checkpoint",
    "evaluation",
    "generation",
    "model.device",
    "data.test",
    "train.epochs",
    "train.max_steps",
    "train.micro_batch_size",
    "train.log_every",
    "train.diverge_factor",
    "train.gradient_checkpointing",
)


def check_same_run(run: RunFolder, spec: Spec, fingerprints: Mapping[str, str], observer: Observer) -> None:
    """Compare with what the run was begun with.

    SpecError: a key changed that would change the result. DataError: the rows changed. Other changes are told.
    """
    begun = load_spec(run.resolved).spec
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


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def differences(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """(key, "key: old -> new") of every value that differs."""
    for key in before.keys() | after.keys():
        old, new, where = before.get(key), after.get(key), f"{path}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{where}.")
        elif old != new:
            yield where, f"{where}: {old} -> {new}"
