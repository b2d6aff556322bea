"""The parent of a run's processes on this machine: starts them, passes signals on, and ends all when one has failed.

It loads no model and touches no GPU. The first process has the terminal; what the others say is kept for the case that
one of them is the first to fail.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from reft_cli.errors import SpecError
from reft_cli.parallel.world import RENDEZVOUS

LOST = 75  # how one of our processes ends when another one is gone; its parent knows the cause
AGREED = 30.0  # seconds that the others get to end by themselves after one has ended with an exit code
STRANDED = 5.0  # the same after one was killed, when the others wait for it in vain
POLL = 0.05
FORWARDED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


@dataclass(frozen=True)
class Outcome:
    """How the processes ended: the exit code of the first cause, and what it said if nobody has heard it yet."""

    code: int
    said: str | None = None
    """The failing process's own words, to be passed on as they are."""
    lost: str | None = None
    """What became of a process that could not say it."""


def count(wanted: int | str, *, device: str) -> int:
    """How many processes `parallel.processes` means here. SpecError: there are fewer GPUs."""
    if wanted == 1 or (wanted == "auto" and device not in ("auto", "cuda")):
        return 1
    gpus = _gpus() if device in ("auto", "cuda") else 0
    if wanted == "auto":
        return max(gpus, 1)
    if ":" in device:
        raise SpecError(f"parallel.processes: {wanted} processes need a device each; write model.device: cuda or auto")
    if device == "mps" or 0 < gpus < int(wanted):
        there = "one device" if device == "mps" else f"{gpus} CUDA devices"
        raise SpecError(f"parallel.processes: {wanted} are asked for, and this machine has {there}")
    return int(wanted)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def run(words: Sequence[str], count: int) -> Outcome:
    """Run `python -m reft_cli WORDS` as `count` processes of one run."""
    return run_command([sys.executable, "-m", "reft_cli", *words], count)


def run_command(command: Sequence[str], count: int) -> Outcome:
    """Run a command as `count` processes that find their place in the environment."""
    with tempfile.TemporaryDirectory(prefix="reft-") as folder:
        children = _Children(command, count, Path(folder))
        with _forwarding(children):
            return children.outcome()


class _Children:
    """The processes, in the order of their ranks."""

    def __init__(self, command: Sequence[str], count: int, folder: Path) -> None:
        self.errors = [folder / f"rank_{rank}.err" for rank in range(count)]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ended: dict[int, int] = {}  # rank -> return code, in the order of the ends
        self.asked: int | None = None
        try:
            for rank in range(count):
                self.processes.append(self._start(command, rank, count, folder))
        except BaseException:
            self.kill()
            raise

    def _start(self, command: Sequence[str], rank: int, count: int, folder: Path) -> subprocess.Popen[bytes]:
        with contextlib.ExitStack() as stack:
            quiet: dict[str, int | IO[bytes]] = {}
            if rank:
                quiet = {"stdout": subprocess.DEVNULL, "stderr": stack.enter_context(self.errors[rank].open("wb"))}
            return subprocess.Popen(
                list(command),
                env=_environment(rank, count, folder),
                stdin=subprocess.PIPE,  # it ends when the parent does
                start_new_session=True,  # Ctrl-C reaches the parent only, who passes it on once
                **quiet,  # type: ignore[call-overload]
            )

    def outcome(self) -> Outcome:
        """Wait for all; when one has failed, end those that do not end by themselves."""
        deadline = float("inf")
        while self._alive():
            time.sleep(POLL)
            failed = self._failed()
            if failed and deadline == float("inf"):
                gone = any(code < 0 or code == LOST for code in failed.values())
                deadline = time.monotonic() + (STRANDED if gone and self.asked is None else AGREED)
            if time.monotonic() > deadline:
                break
        failed = self._failed()
        self.kill()
        return self._judged(failed)

    def _alive(self) -> bool:
        for rank, process in enumerate(self.processes):
            if rank not in self.ended and process.poll() is not None:
                self.ended[rank] = process.returncode
        return len(self.ended) < len(self.processes)

    def _failed(self) -> dict[int, int]:
        return {rank: code for rank, code in self.ended.items() if code}

    def kill(self) -> None:
        """End whatever is left, at once."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdin:
                process.stdin.close()

    def send(self, number: int, _: FrameType | None = None) -> None:
        """Pass a signal on; a second one that asks to stop ends everything at once. Waits for nothing: a handler."""
        if number in (signal.SIGINT, signal.SIGTERM):
            self.asked, number = number, number if self.asked is None else signal.SIGKILL
        for process in self.processes:
            process.send_signal(number)

    def _judged(self, failed: dict[int, int]) -> Outcome:
        if self.asked is not None and any(code < 0 for code in failed.values()):
            return Outcome(128 + self.asked)
        causes = [rank for rank, code in failed.items() if code != LOST]
        if not failed:
            return Outcome(0)
        if not causes:
            return Outcome(1, lost="the processes of this run lost each other")
        rank, code = causes[0], failed[causes[0]]
        if code < 0:
            name = signal.Signals(-code).name
            hint = "; is there too little memory in the machine?" if name == "SIGKILL" else ""
            return Outcome(128 - code, lost=f"process {rank} of {len(self.processes)} was ended by {name}{hint}")
        if rank == 0 or failed.get(0) == code:
            return Outcome(code)
        return Outcome(code, said=self._last_words(rank))

    def _last_words(self, rank: int) -> str:
        text = self.errors[rank].read_text(encoding="utf-8", errors="replace").strip()
        return text.splitlines()[-1] if text else f"process {rank} of {len(self.processes)} failed and said nothing"


def _environment(rank: int, count: int, folder: Path) -> dict[str, str]:
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    found = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        RENDEZVOUS: str(folder / "rendezvous"),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",  # a file in the working directory must not stand in for a library
    }
    found.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    loopback = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    if loopback:
        found.setdefault("GLOO_SOCKET_IFNAME", loopback.pop())  # the machine's own name need not resolve
    return found


@contextlib.contextmanager
def _forwarding(children: _Children) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, children.send) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """In one of the processes: ask to stop, as a scheduler would, when the parent is gone."""

    def wait() -> None:
        while os.read(descriptor, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    descriptor = sys.stdin.fileno()
    threading.Thread(target=wait, daemon=True).start()
