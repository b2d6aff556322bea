"""Forward and backward passes over micro-batches: as they come, or recorded once as a CUDA graph and replayed.

A pass of a small model is a thousand kernels of some microseconds each, and starting them takes the host longer than
running them takes the GPU. A recording starts them all at once. It holds for batches of one size, so batches are filled
up to sizes of which there are few; it reads and writes the same memory every time, so batches are copied into it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from reft_cli.data.batch import Batch
from reft_cli.data.capacity import fill
from reft_cli.models.capturing import NotCaptured, capture
from reft_cli.models.intervened import IntervenedModel
from reft_cli.tasks.objectives import Task

# Operations a block of a pass above which the GPU is busy longer than the host needs to start them: 2.5 ms a block
# (measured on an H200: 16 blocks take the host 40 ms forward and backward) at 8e14 a second. Nothing is won then.
LAUNCH_BOUND = 2e12
MOST_RECORDINGS = 48  # sizes of batches; each costs some megabytes of the GPU's memory, others run as they come


class Passes(Protocol):
    """What the loop calls for a micro-batch on the host."""

    def prepare(self, batch: Batch) -> Batch:
        """The batch as it is to be called with; on the host, in any thread."""
        ...

    def __call__(self, batch: Batch, units: float) -> Tensor:
        """Add the gradients of loss / units to what is there; returns loss / units, detached, on the device."""
        ...


class PlainPasses:
    """Every pass is run as it comes. `scaler` scales the loss for float16."""

    def __init__(self, model: IntervenedModel, task: Task, scaler: torch.amp.GradScaler) -> None:
        self.model, self.task, self.scaler = model, task, scaler

    def prepare(self, batch: Batch) -> Batch:
        """The batch as it is."""
        return batch

    def __call__(self, batch: Batch, units: float) -> Tensor:
        """See Passes."""
        there = batch.to(self.model.device)
        with self.model.editing(there.rows), self.model.above(there.frozen):
            loss = self.task.loss(self.model, there) / units
            self.scaler.scale(loss).backward()
        return loss.detach().to(self.model.device)


def why_not_recorded(model: IntervenedModel, *, packed: bool, checkpointing: bool, dropout: bool) -> str | None:
    """None if passes can be recorded, else the reason."""
    weight = next(model.base_model.parameters())
    if weight.device.type != "cuda":
        return f"there are no CUDA graphs on {weight.device.type}"
    if not packed:
        return "padded batches come in too many sizes"
    if weight.dtype != torch.bfloat16:
        return f"packed attention in {str(weight.dtype).removeprefix('torch.')} reads lengths on the host"
    if checkpointing:
        return "train.gradient_checkpointing is on"
    return "there is dropout" if dropout else None


def longest_recorded(model: IntervenedModel) -> float:
    """Tokens of a pass from which on the host keeps ahead of the GPU, so that nothing is recorded."""
    return LAUNCH_BOUND * model.block_count / model.operations_a_token()


class RecordedPasses:
    """Passes as CUDA graphs, one for each size of batch; a size is run as it comes once, then recorded.

    `prepare` fills batches up, so that there are few sizes, and leaves those that are too long to be worth it. A model
    that cannot be recorded, say because its router looks at values on the host, runs as it comes, and so does one whose
    recordings do not fit beside each other; `tell` is told why.
    """

    def __init__(
        self, model: IntervenedModel, task: Task, *, pad_token_id: int, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        self.model, self.task, self.pad_token_id, self.tell = model, task, pad_token_id, tell
        self.refused = False
        self._plain = PlainPasses(model, task, torch.amp.GradScaler("cuda", enabled=False))
        self._longest = longest_recorded(model)
        self._pool, self._stream = torch.cuda.MemPool(), torch.cuda.Stream()
        self._recordings: dict[tuple[int, ...], _Recording] = {}
        self._seen: set[tuple[int, ...]] = set()

    def prepare(self, batch: Batch) -> Batch:
        """The batch filled up, unless it is too long to be recorded."""
        return batch if self._is_long(batch) else fill(batch, pad_token_id=self.pad_token_id)

    def __call__(self, batch: Batch, units: float) -> Tensor:
        """See Passes."""
        if self.refused or self._is_long(batch):
            return self._plain(batch, units)
        numbers = (each for _, each in sorted(batch.inputs.items()) if isinstance(each, int))  # those are recorded too
        size = (*(tensor.numel() for tensor in _tensors(batch)), *numbers)
        if size in self._recordings:
            return self._recordings[size].replay(batch, units)
        if size not in self._seen or len(self._recordings) >= MOST_RECORDINGS:
            self._seen.add(size)
            return self._first(batch, units)
        reason = self._record(size, batch)
        if reason is not None:
            self._refuse(reason)
            return self._plain(batch, units)
        return self._recordings[size].replay(batch, units)

    def _record(self, size: tuple[int, ...], batch: Batch) -> str | None:
        """None if this size is recorded now, else the reason; the error itself would hold on to the pass it ended."""
        try:
            self._recordings[size] = _Recording(self.model, self.task, batch, pool=self._pool, stream=self._stream)
        except NotCaptured as reason:
            return f"this model cannot be recorded: {reason}"
        except torch.OutOfMemoryError:
            return f"there is too little memory to record more than {len(self._recordings)} sizes of passes"
        return None

    def _refuse(self, reason: str) -> None:
        """Run everything as it comes from now on, with the memory that recordings held."""
        self.refused = True
        self._recordings.clear()
        torch.cuda.empty_cache()
        self.tell(reason)

    def _is_long(self, batch: Batch) -> bool:
        ids = batch.inputs["input_ids"]
        return isinstance(ids, Tensor) and ids.numel() > self._longest

    def _first(self, batch: Batch, units: float) -> Tensor:
        """As it comes, on the stream and in the memory of the recordings, which lies idle meanwhile."""
        now = torch.cuda.current_stream()
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool), _one_thread():
            loss = self._plain(batch, units)
        now.wait_stream(self._stream)
        return loss.clone()


def _one_thread() -> AbstractContextManager[None]:
    """Backward passes run in this thread, whose memory comes from the pool that is in use."""
    return torch.autograd.set_multithreading_enabled(False)


class _Recording:
    """One size of batch: the memory it is copied to, and the graph that reads it."""

    def __init__(
        self, model: IntervenedModel, task: Task, batch: Batch, *, pool: torch.cuda.MemPool, stream: torch.cuda.Stream
    ) -> None:
        self.batch = batch.to(model.device)
        self.share = torch.ones((), device=model.device)
        self.loss = self.share
        pass_once = functools.partial(self._pass, model, task)
        self.graph = capture(pass_once, pool=pool.id, stream=stream)

    def _pass(self, model: IntervenedModel, task: Task) -> None:
        leaves = model.bank.leaves()
        with _one_thread(), model.editing(self.batch.rows), model.above(self.batch.frozen):
            self.loss = task.loss(model, self.batch) * self.share
            slopes = torch.autograd.grad(self.loss, leaves, allow_unused=True)
            for leaf, slope in zip(leaves, slopes, strict=True):
                if slope is not None and leaf.grad is not None:
                    leaf.grad += slope

    def replay(self, batch: Batch, units: float) -> Tensor:
        """Run the graph over another batch of the size."""
        for there, new in zip(_tensors(self.batch), _tensors(batch), strict=True):
            there.copy_(new, non_blocking=True)
        self.share.fill_(1 / units)
        self.graph.replay()
        return self.loss.detach().clone()


def _tensors(batch: Batch) -> Iterator[Tensor]:
    yield from (each for _, each in sorted(batch.inputs.items()) if isinstance(each, Tensor))
    yield from (rows for _, rows in sorted(batch.rows.items()))
    yield from (batch.answer_rows, batch.targets)
    yield from (each for each in (batch.owners, batch.reference, batch.frozen) if each is not None)
