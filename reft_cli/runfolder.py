"""The run folder on disk: what a run wrote, how it is found again, and what may be deleted.

    spec.yaml  resolved.yaml  run.json  metrics.jsonl  checkpoints/step_000123/  best  last  eval/  logs/  README.md

`best` and `last` are relative links into checkpoints/. What a checkpoint holds is not known here, nor are tensors.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from reft_cli import modelcard
from reft_cli.environment import blotted, git_state, versions
from reft_cli.errors import MACHINE_FAULTS, CheckpointError, SpecError, reason_of
from reft_cli.reading import LARGEST_LOG, Moment, check_kinds, parse_json, read_json, read_text, read_yaml
from reft_cli.writing import json_line, json_text, write_atomic

Link = Literal["best", "last"]
Status = Literal["running", "done", "failed", "interrupted"]
FORMAT = 1  # of run.json; raised when old readers would misread
RECORD = {  # kinds of what is read of run.json
    "reft_run": int,
    "status": str,
    "exit_code": int | None,
    "started": Moment | None,
    "ended": Moment | None,
    "attempts": list[dict[str, Any]],
    "versions": dict[str, str | None],
    "devices": list[str],
    "base": dict,
    "trainable": int,
    "token_budget": int,
    "data": dict[str, dict[str, Any]],
}
BASE = {"name": str, "commit": str | None, "parameters": int}
SPLIT = {"name": str, "read": int, "used": int, "fingerprint": str}
EVALUATION = {"metrics": dict[str, float | None], "base_metrics": dict[str, float | None]}
SECTIONS = dict.fromkeys(("model", "intervention", "task", "data", "train"), dict)  # of a resolved spec
CHECKPOINT_MARK = "reft.json"  # a folder with this file is a checkpoint
VALIDATION = "validation_"  # what the keys of validation scores begin with in metrics.jsonl
STEP_NAME = re.compile(r"step_(\d{6,})")
_locks: dict[Path, int] = {}  # descriptors of the folders that this process writes


class RunFolder:
    """One run's folder. Making the object touches nothing on disk."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.spec = self.path / "spec.yaml"
        self.resolved = self.path / "resolved.yaml"
        self.record = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.card = self.path / "README.md"

    @classmethod
    def create(cls, path: Path | str, *, resume: bool = False, overwrite: bool = False) -> RunFolder:
        """Make the folder, or take the one that is there; it then belongs to this process until it ends.

        SpecError if a run is in the way and neither `resume` nor `overwrite` was asked for, if there is nothing to
        resume, if another process writes it, or if the folder holds something that is no run (that is never deleted).
        """
        run = cls(path)
        run.check(resume=resume, overwrite=overwrite)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            run._lock()
        except OSError as error:
            if error.errno in MACHINE_FAULTS - {errno.EROFS}:
                raise
            raise SpecError(f"{run.path}: cannot write there: {reason_of(error)}") from error
        if overwrite and not resume:
            run._clear()
        return run

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raise the SpecError of `create`, but for another process's; nothing is touched."""
        if not self.exists():
            self._refuse_foreign()
            if resume:
                raise SpecError(f"{self.path} holds no run, so there is nothing to resume. Leave out --resume.")
        elif not (resume or overwrite):
            raise SpecError(self._in_the_way())

    def exists(self) -> bool:
        """Whether a run lives here: there is a run.json that reft wrote."""
        try:
            return "reft_run" in read_json(self.record)
        except (CheckpointError, TypeError):
            return False

    def _in_the_way(self) -> str:
        status = self.status()
        state = {"done": "has finished", "running": "is unfinished"}.get(status, f"is unfinished ({status})")
        return f"{self.path} exists and {state}. Continue with --resume, start over with --overwrite, or give --name."

    def _refuse_foreign(self) -> None:
        if self.path.is_dir() and not any(self._contents()):
            return
        if self.path.exists() or self.path.is_symlink():
            raise SpecError(
                f"{self.path} exists and is not a run (it has no run.json of reft's); it is left as it is. "
                "Give --name or --output."
            )

    def _contents(self) -> Iterator[Path]:
        """Entries besides our own hidden ones, which a killed start leaves behind."""
        return (p for p in self.path.iterdir() if p.name != ".lock" and not p.name.endswith(".tmp"))

    def _clear(self) -> None:
        for entry in sorted(
            self._contents(), key=lambda entry: entry == self.record
        ):  # last: killed, it is a run still
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _lock(self) -> None:
        """Hold the folder until the process ends; the kernel lets go of it even after SIGKILL."""
        key = self.path.resolve()
        if os.name != "posix" or key in _locks:
            return
        descriptor = _take_lock(os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644))
        if descriptor is None:
            raise SpecError(f"{self.path} is being written by another process. Wait for it, or give --name.")
        _locks[key] = descriptor

    def is_written(self) -> bool:
        """Whether a process, this one or another, holds the folder now; without locks, what run.json says."""
        if os.name != "posix":
            return self.read().get("status") == "running"
        if self.path.resolve() in _locks:
            return True
        try:
            descriptor = _take_lock(os.open(self.path / ".lock", os.O_RDWR | os.O_CLOEXEC))
        except OSError:
            return False
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is None

    def status(self) -> str:
        """The status in run.json; `killed` for a run that is said to be running and that nobody writes."""
        said = str(self.read().get("status", "unknown"))
        return "killed" if said == "running" and not self.is_written() else said

    def release(self) -> None:
        """Let other processes write the folder again."""
        descriptor = _locks.pop(self.path.resolve(), None)
        if descriptor is not None:
            os.close(descriptor)

    # ---- the spec, run.json

    def write_spec(self, text: str, *, resolved: str) -> None:
        """Keep the spec as it was written, and with every key filled."""
        write_atomic(self.spec, text)
        write_atomic(self.resolved, resolved)

    def begin(self, *, command: Sequence[str], facts: Mapping[str, Any]) -> None:
        """Write run.json with status running. `facts` are keys of the run: devices, base, data, micro_batch_size, ...

        When the run was begun before, what is known stays and that attempt moves to `attempts`.
        """
        earlier = self.read() if self.exists() else {}
        last = {key: earlier[key] for key in ("started", "ended", "status", "exit_code", "command") if key in earlier}
        self._write(
            earlier
            | {
                "reft_run": FORMAT,
                "name": self.path.resolve().name,
                "status": "running",
                "exit_code": None,
                "reason": None,
                "command": [Path(command[0]).name, *command[1:]],
                "started": _now(),
                "ended": None,
                "versions": versions(),
                "git": git_state(Path.cwd()),
                "attempts": [*earlier.get("attempts", []), last] if last else [],
            }
            | dict(facts)
        )
        (self.path / "checkpoints").mkdir(exist_ok=True)  # after run.json, without which it would be in the way

    def note(self, facts: Mapping[str, Any]) -> None:
        """Add or replace keys of run.json."""
        self._write(self.read() | dict(facts))

    def finish(self, status: Status, *, exit_code: int, reason: str) -> None:
        """Write how the run ended, and let go of the folder."""
        self.note({"status": status, "exit_code": exit_code, "reason": reason, "ended": _now()})
        self.release()

    def read(self) -> dict[str, Any]:
        """run.json; CheckpointError if it is missing or damaged."""
        if not self.record.exists():
            raise CheckpointError(f"{self.path} is not a run (it has no run.json)")
        found = read_json(self.record)
        if not isinstance(found, dict) or "reft_run" not in found:
            raise CheckpointError(f"{self.record} was not written by reft")
        check_kinds(found, RECORD, where=str(self.record))
        if found["reft_run"] > FORMAT:
            raise CheckpointError(f"{self.record} is of a newer reft (format {found['reft_run']}); update reft")
        for split in found.get("data", {}).values():
            check_kinds(split, SPLIT, where=str(self.record))
        check_kinds(found.get("base", {}), BASE, where=str(self.record))
        return found

    def _write(self, record: Mapping[str, Any]) -> None:
        write_atomic(self.record, blotted(json_text(record)))

    # ---- metrics.jsonl

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line, on disk when this returns; NaN and infinity become null."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json_line(record))

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines; a last one that a kill tore is left out."""
        if not self.metrics.exists():
            return []
        lines = read_text(self.metrics, largest=LARGEST_LOG).split("\n")[:-1]
        return [self._metrics_line(number, line) for number, line in enumerate(lines, start=1)]

    def _metrics_line(self, number: int, line: str) -> dict[str, Any]:
        where = f"{self.metrics}:{number}"
        found = parse_json(line, where=where)
        if not isinstance(found, dict):
            raise CheckpointError(f"{where}: damaged: not an object; remove the line")
        check_kinds(found, {"step": int}, where=where)
        return found

    def truncate_metrics(self, *, after: int, validated: bool = True) -> None:
        """Drop the lines of later steps, and those of that step's validation unless it was `validated`."""

        def stays(line: Mapping[str, Any]) -> bool:
            step = line.get("step", 0)
            return step < after or (
                step == after and (validated or not any(key.startswith(VALIDATION) for key in line))
            )

        kept = [line for line in self.read_metrics() if stays(line)]
        write_atomic(self.metrics, "".join(map(json_line, kept)))

    # ---- checkpoints

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step is, or will be."""
        return self.path / "checkpoints" / f"step_{step:06d}"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        folder = self.path / "checkpoints"
        named = (p for p in folder.iterdir() if STEP_NAME.fullmatch(p.name)) if folder.is_dir() else ()
        return sorted((p for p in named if (p / CHECKPOINT_MARK).is_file()), key=step_of)

    def link(self, name: Link, checkpoint: Path) -> None:
        """Point `best` or `last` at a checkpoint, in one step that cannot be seen half done."""
        target = f"checkpoints/{checkpoint.name}"
        new = self.path / f".{name}.tmp"
        new.unlink(missing_ok=True)
        try:
            new.symlink_to(target, target_is_directory=True)
        except (OSError, NotImplementedError):  # a file system without links: the same text in a file
            write_atomic(self.path / name, target + "\n")
            return
        new.replace(self.path / name)

    def linked(self, name: Link) -> Path | None:
        """The checkpoint that `best` or `last` points at; None if there is no such link or its checkpoint is gone.

        CheckpointError: it points at something else.
        """
        link = self.path / name
        if not link.is_symlink() and not link.exists():
            return None
        target = os.readlink(link) if link.is_symlink() else read_text(link).strip()
        folder, _, step = target.rpartition("/")
        if folder != "checkpoints" or not STEP_NAME.fullmatch(step):
            raise CheckpointError(f"{link}: damaged: it does not lead to a checkpoint of this run; remove it")
        checkpoint = self.path / "checkpoints" / step
        return checkpoint if (checkpoint / CHECKPOINT_MARK).is_file() else None

    def select(self, which: str | None = None) -> Path:
        """The checkpoint called `best`, `last`, by its step or folder; without a name the best, else the last.

        CheckpointError names those that there are.
        """
        there = self.checkpoints()
        if not there:
            raise CheckpointError(f"{self.path} has no checkpoint (status: {self.status()})")
        if which is None:
            return self.linked("best") or self.linked("last") or there[-1]
        if which == "last":
            return self.linked("last") or there[-1]
        found = self.linked("best") if which == "best" else None
        if (step := which.removeprefix("step_")).isdecimal():
            found = next((p for p in there if step_of(p) == int(step)), None)
        if found is None:
            steps = ", ".join(str(step_of(p)) for p in there)
            raise CheckpointError(f"{self.path} has no checkpoint `{which}`; there are last and the steps {steps}")
        return found

    def prune(self, keep: int) -> list[Path]:
        """Delete all but the newest `keep` checkpoints and those that `best` and `last` point at; returns the deleted.

        Incomplete checkpoints of an earlier attempt go too.
        """
        there = self.checkpoints()
        stay = {*there[max(0, len(there) - keep) :], self.linked("best"), self.linked("last")}
        return self._delete([p for p in there if p not in stay])

    def forget(self, *, after: int) -> list[Path]:
        """Delete the checkpoints of later steps, from whose past a resumed run goes on; returns the deleted."""
        return self._delete([p for p in self.checkpoints() if step_of(p) > after])

    def _delete(self, gone: list[Path]) -> list[Path]:
        """Delete checkpoints and what is none; killed at any moment, no half one is left that looks whole."""
        for path in gone:
            (path / CHECKPOINT_MARK).unlink()
        there = self.checkpoints()
        for path in (self.path / "checkpoints").glob("*"):
            if path.is_symlink() and path not in there:
                path.unlink()
            elif path.is_dir() and path not in there:
                shutil.rmtree(path)
        return gone

    # ---- results

    def evaluation(self, name: str, *, suffix: str = ".json") -> Path:
        """Where the result of an evaluation called `name` is written; its folder is made."""
        path = self.path / "eval" / (re.sub(r"[^A-Za-z0-9._-]+", "_", name) + suffix)
        path.parent.mkdir(exist_ok=True)
        return path

    def evaluations(self) -> dict[str, dict[str, Any]]:
        """Name -> result of every evaluation that was kept."""
        files = sorted((self.path / "eval").glob("*.json"))
        found = {file.stem: read_json(file) for file in files}
        for file in files:
            if not isinstance(found[file.stem], dict):
                raise CheckpointError(f"{file}: damaged: not the result of an evaluation")
            check_kinds(found[file.stem], EVALUATION, where=str(file))
        return found

    def scores(self) -> tuple[int, dict[str, float]] | None:
        """(step, validation scores) of the checkpoint that `select()` takes; None if it was not validated."""
        there = self.linked("best") or self.linked("last") or next(iter(self.checkpoints()[::-1]), None)
        lines = [line for line in self.read_metrics() if there and line.get("step") == step_of(there)]
        found = {
            key.removeprefix(VALIDATION): value
            for line in lines
            for key, value in line.items()
            if key.startswith(VALIDATION) and isinstance(value, int | float)
        }
        return (step_of(there), found) if there and found else None

    def read_spec(self) -> dict[str, Any]:
        """The spec with every key filled, as plain values; empty for a run that ended before it was written."""
        if not self.resolved.exists():
            return {}
        spec = read_yaml(self.resolved)
        check_kinds(spec, SECTIONS, where=str(self.resolved))
        return spec

    def write_card(self) -> None:
        """Write README.md from what the folder holds."""
        card = modelcard.render(
            name=self.path.name if self.path.is_absolute() else str(self.path),
            record=self.read(),
            spec=self.read_spec(),
            validation=self.scores(),
            evaluations=self.evaluations(),
            spec_text=read_text(self.spec),
        )
        write_atomic(self.card, blotted(card))


@dataclass(frozen=True)
class Found:
    """What a path means: a checkpoint, and the run it belongs to if it lies in one."""

    checkpoint: Path
    run: RunFolder | None


def find(path: Path | str, *, checkpoint: str | None = None) -> Found:
    """Take a run folder, a checkpoint folder, or `runs/x/best`, and say which checkpoint is meant.

    `checkpoint` is best, last or a step, and only goes with a run folder. CheckpointError if there is no such thing.
    """
    path = Path(path)
    run = RunFolder(path)
    if run.exists():
        return Found(checkpoint=run.select(checkpoint), run=run)
    if path.name in ("best", "last") and RunFolder(path.parent).exists():
        meant = RunFolder(path.parent).select(path.name)
    elif (path / CHECKPOINT_MARK).is_file():
        meant = path
    else:
        raise CheckpointError(_nothing_at(path))
    if checkpoint is not None:
        raise SpecError(f"{path} is one checkpoint; --checkpoint {checkpoint} goes with a run folder")
    folder = path.parent if path.name in ("best", "last") else path.parent.parent
    inside = meant.parent.name == "checkpoints" and RunFolder(folder).exists()
    return Found(checkpoint=meant, run=RunFolder(folder) if inside else None)


def runs_in(folder: Path) -> list[RunFolder]:
    """Runs that lie directly in a folder, by name."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [run for run in map(RunFolder, entries) if run.exists()]


def _nothing_at(path: Path) -> str:
    if path.exists():
        return f"{path} is neither a run (it has no run.json) nor a checkpoint (it has no {CHECKPOINT_MARK})"
    names = [run.path.name for run in runs_in(path.parent)]
    near = get_close_matches(path.name, names, n=1)
    if near:
        return f"{path} does not exist; did you mean {path.parent / near[0]}?"
    return f"{path} does not exist; `reft runs ls` lists the runs that there are"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    match = STEP_NAME.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def _take_lock(descriptor: int) -> int | None:
    """The descriptor, now locked; None, and it is closed, if another process holds the lock."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
