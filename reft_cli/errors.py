"""Errors that a user can cause, each with the exit code it ends the program with.

ReftError
├── SpecError        2   the YAML file, a flag, or a run folder that is in the way
├── DataError        3   a data file, its columns, its rows
├── ModelError       4   a model that cannot be found, or that does not fit
├── CheckpointError  4   a checkpoint that is damaged, or of another base model
├── MemoryExhausted  5   out of memory, after everything smaller was tried
├── Diverged         6   the loss is NaN or exploded
├── BelowThreshold   7   `--fail-under` not met
├── ProcessLost      1   another process of the run is gone, or 128 + the signal that ended it
└── Interrupted   130/143   SIGINT or SIGTERM; a checkpoint was saved

A message says where (file:line:column, key or path), what was given and what to do, in one line if it can.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any, ClassVar

# A full or broken disk and the like: neither the user's doing nor a fault of ours. A bare ReftError (1) says it.
MACHINE_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, with the place it was found at."""

    message: str
    file: str | None = None
    line: int | None = None
    column: int | None = None
    key: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        place = self.file or ""
        for number in (self.line, self.column):
            place += f":{number}" if number else ""
        return ": ".join(part for part in (place, self.key, self.message) if part)


class ReftError(Exception):
    """Base of all errors that are shown to a user as text, never as a traceback."""

    code: ClassVar[int] = 1
    kind: ClassVar[str] = "error"

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p) for p in problems)
        super().__init__("\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Problems and all, for the run's other processes."""
        return _rebuilt, (type(self), self.problems), self.__dict__


class SpecError(ReftError):
    """The spec, a flag or the run folder is not usable."""

    code, kind = 2, "spec"


class DataError(ReftError):
    """A data file cannot be read or does not fit its format."""

    code, kind = 3, "data"


class ModelError(ReftError):
    """The base model cannot be loaded or does not have what the spec asks for."""

    code, kind = 4, "model"


class CheckpointError(ReftError):
    """A checkpoint is missing, damaged, or belongs to another base model."""

    code, kind = 4, "checkpoint"


class MemoryExhausted(ReftError):
    """The device has too little memory for the smallest possible step."""

    code, kind = 5, "memory"


class Diverged(ReftError):
    """The loss is NaN or infinite, or exploded."""

    code, kind = 6, "diverged"


class BelowThreshold(ReftError):
    """A score is below the one that `--fail-under` asks for."""

    code, kind = 7, "threshold"


class ProcessLost(ReftError):
    """Another process of the run is gone, so that this one cannot go on."""

    kind = "process"

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(ReftError):
    """A signal ended the run after a checkpoint was saved."""

    kind = "interrupted"

    def __init__(self, message: str, *, signal: int) -> None:
        super().__init__(message)
        self.signal = signal

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as shells have it."""
        return 128 + self.signal


def exit_code(error: ReftError) -> int:
    """The process's exit code for an error."""
    return error.exit_code if isinstance(error, Interrupted | ProcessLost) else error.code


def reason_of(error: OSError) -> str:
    """What the system says of a file or a disk, in small letters: `no space left on device`."""
    return (error.strerror or str(error)).lower()


def first_line(error: BaseException) -> str:
    """The first line of an error of a library, or its name if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _rebuilt(kind: type[ReftError], problems: tuple[Problem, ...]) -> ReftError:
    error = kind.__new__(kind)
    ReftError.__init__(error, *problems)
    return error
