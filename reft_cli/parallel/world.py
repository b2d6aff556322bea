"""Which of a run's processes this one is, as a launcher says it in the environment. Nothing heavy is imported.

torchrun, `accelerate launch` and `reft train` set RANK, WORLD_SIZE and LOCAL_RANK; by hand, LOCAL_RANK may be left out
where each machine has as many processes as devices.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from reft_cli.errors import SpecError

RENDEZVOUS = "REFT_RENDEZVOUS"  # the file over which the processes that `reft train` started find each other


@dataclass(frozen=True)
class World:
    """One process among `size`; `local` is its number on its own machine."""

    rank: int
    size: int
    local: int | None = None


def world() -> World | None:
    """What a launcher said of this process; None if it was started by itself. SpecError: numbers that cannot be."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if not rank < size:
        raise SpecError(f"RANK is {rank} and WORLD_SIZE {size}; ranks go from 0 to WORLD_SIZE - 1")
    return World(rank, size, _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else None)


def is_launched() -> bool:
    """Whether a launcher started this process, even as the only one (`accelerate launch` says little then)."""
    return world() is not None or "ACCELERATE_MIXED_PRECISION" in os.environ


def is_ours() -> bool:
    """Whether `reft train` started this process, and so watches it and speaks for it."""
    return RENDEZVOUS in os.environ


def _number(name: str) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdecimal()):
        raise SpecError(f"the environment variable {name} is `{text}`, and has to be a whole number")
    return int(text)
