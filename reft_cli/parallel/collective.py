"""What the processes of a run do together: join, share rows out, add gradients up, agree on numbers and on failures.

Everything works in a single process too, where it does nothing. Every process has to come to each call, in one order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from reft_cli.errors import ProcessLost, ReftError, SpecError, first_line
from reft_cli.parallel.world import RENDEZVOUS, World, world

Item = TypeVar("Item")
Result = TypeVar("Result")
PATIENCE = timedelta(minutes=30)  # for the slowest process: the first one may be downloading, or scoring for others
_separate: ContextVar[bool] = ContextVar("separate", default=False)
SHARED_FAILURES = (ReftError, torch.OutOfMemoryError, OSError)  # those that `together` passes on


@contextmanager
def joined(*, device: str = "auto") -> Iterator[None]:
    """Inside, this process is one of those that a launcher started; `device` is the spec's `model.device`.

    SpecError: the launcher's numbers do not fit this machine. ProcessLost: the others did not come.
    """
    given = world()
    if given is None or dist.is_initialized():
        yield
        return
    method, backend = _method(), _take_device(given, device)
    with _losses("the processes did not find each other (MASTER_ADDR, MASTER_PORT, or a process that never started)"):
        dist.init_process_group(backend, init_method=method, rank=given.rank, world_size=given.size, timeout=PATIENCE)
    try:
        yield
    except ProcessLost:
        raise  # nobody is there to take leave of
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _method() -> str:
    if RENDEZVOUS in os.environ:
        return f"file://{os.environ[RENDEZVOUS]}"
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise SpecError(f"RANK and WORLD_SIZE are set and {' and '.join(missing)} not; processes meet there")
    return "env://"


def _take_device(given: World, device: str) -> str:
    """Make this process's GPU the current one; returns the backends."""
    devices = 0 if device in ("cpu", "mps") else torch.cuda.device_count()
    local = given.local if given.local is not None else given.rank % max(devices, 1)
    os.environ["LOCAL_RANK"] = str(local)  # Accelerate reads it
    if not devices:
        return "gloo"
    if ":" in device and given.size > 1:
        raise SpecError(f"model.device: {device} is one device, and {given.size} processes need one each; write cuda")
    if local >= devices:
        raise SpecError(f"LOCAL_RANK is {local}, and this machine has {devices} CUDA devices: start fewer processes")
    torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl"


@contextmanager
def _losses(message: str = "another process of this run ended") -> Iterator[None]:
    """What torch says of a broken connection becomes ProcessLost."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TimeoutError) as error:
        raise ProcessLost(f"{message}: {first_line(error)[:300]}") from error


def rank() -> int:
    """The number of this process; 0 is the one that writes and speaks."""
    return dist.get_rank() if dist.is_initialized() and not _separate.get() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() and not _separate.get() else 1


@contextmanager
def separately(wanted: bool = True) -> Iterator[None]:
    """Inside, this process is the only one as far as this file goes; all do the same, in step."""
    before = _separate.set(wanted)
    try:
        yield
    finally:
        _separate.reset(before)


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one type and device by their sums over the processes, in one all-reduce."""
    if size() == 1:
        return
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    with _losses():
        dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(part.view_as(tensor))


def copy_first(tensors: Sequence[Tensor]) -> None:
    """Give every process the first one's numbers; one type and device."""
    if size() == 1:
        return
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    with _losses():
        dist.broadcast(flat, 0)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(part.view_as(tensor))


def total(number: float) -> float:
    """Σ over the processes, in double precision."""
    if size() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.float64)
    with _losses():
        dist.all_reduce(tensor)
    return float(tensor)


def largest(number: int) -> int:
    """The largest over the processes."""
    if size() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.int64)
    with _losses():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def smallest(number: int) -> int:
    """The smallest over the processes."""
    return -largest(-number)


def gathered(value: Item) -> list[Item]:
    """Every process's value, by rank. Plain picklable values."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    with _losses():
        dist.all_gather_object(found, value)
    return found


@contextmanager
def together() -> Iterator[None]:
    """What fails in one process fails in all, with the error of the lowest rank. Inside, nothing may be collective."""
    if size() == 1:
        yield
        return
    failure: BaseException | None = None
    try:
        yield
    except SHARED_FAILURES as error:
        failure = error
    if not largest(int(failure is not None)):
        return
    raise next(each for each in gathered(failure) if each is not None) from failure


def from_first(make: Callable[[], Result]) -> Result:
    """What the first process makes, in every process."""
    if size() == 1:
        return make()
    made: list[Any] = [None]
    with together():
        if is_first():
            made = [make()]
    with _losses():
        dist.broadcast_object_list(made, 0)
    return made[0]


def by_first(action: Callable[[], None]) -> None:
    """Let the first process do something alone; the others wait, and share its failure."""
    with together():
        if is_first():
            action()


def share(items: Sequence[Item], *, cost: Callable[[Item], float]) -> list[Item]:
    """The items of this process: every n-th by rank of cost, so that all work about equally long."""
    return [items[index] for index in _ranked(items, cost)[rank() :: size()]]


def spread(
    items: Sequence[Item], work: Callable[[list[Item]], list[Result]], *, cost: Callable[[Item], float]
) -> list[Result]:
    """`work(items)`, the items shared out over the processes; every process gets all results, in the items' order."""
    if size() == 1:
        return work(list(items))
    order = _ranked(items, cost)
    with together():
        done = work([items[index] for index in order[rank() :: size()]])
    results = {
        index: result
        for each, part in enumerate(gathered(done))
        for index, result in zip(order[each :: size()], part, strict=True)
    }
    return [results[index] for index in range(len(items))]


def _ranked(items: Sequence[Item], cost: Callable[[Item], float]) -> list[int]:
    if size() == 1:
        return list(range(len(items)))
    return sorted(range(len(items)), key=lambda index: (-cost(items[index]), index))
