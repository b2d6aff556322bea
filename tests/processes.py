"""Functions run by several processes on the CPU, which find each other as those of a launcher do."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

# A fork of a process that has looked at a GPU cannot use it, and a package that is preloaded may look at it.
FORKING = os.name == "posix" and not torch.cuda.is_available()
PROCESSES = multiprocessing.get_context("forkserver" if FORKING else "spawn")
PROCESSES.set_forkserver_preload(["reft_cli.runs", "reft_cli.cli.app"])  # a child then starts in a tenth of a second


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


@contextmanager
def environment(**given: str) -> Iterator[None]:
    """Variables that hold inside."""
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _child(function: Callable[..., Any], arguments: Sequence[Any], places: dict[str, str], sending: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(places)
    sending.send(function(*arguments))


class Group:
    """`count` processes that run a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, count: int = 2, **variables: str) -> None:
        self.pipes, self.processes = [], []
        port = str(free_port())
        for rank in range(count):
            receiving, sending = PROCESSES.Pipe(duplex=False)
            places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
            places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
            given = (function, arguments, places | variables, sending)
            process = PROCESSES.Process(target=_child, args=given)
            process.start()
            sending.close()
            self.pipes.append(receiving)
            self.processes.append(process)

    def results(self, timeout: float = 120) -> list[Any]:
        """What each returned, by rank; None for one that died."""
        found: list[Any] = []
        for pipe in self.pipes:
            try:
                found.append(pipe.recv() if pipe.poll(timeout) else None)
            except EOFError:
                found.append(None)
        for process in self.processes:
            process.join(10)
            process.kill()
        return found


def run_as(function: Callable[..., Any], *arguments: Any, count: int = 2, **variables: str) -> list[Any]:
    """What a function returns in each of `count` processes."""
    return Group(function, *arguments, count=count, **variables).results()
