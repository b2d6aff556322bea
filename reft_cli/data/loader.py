"""Global batches ahead of time: while the model computes one, a thread builds the next, pinned for a GPU.

What is built depends on the rows and the loader's settings alone, so a batch is the same whoever builds it and when.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from reft_cli.data.batch import Batch, Layout, build_batch, cuts
from reft_cli.data.examples import Example, Examples
from reft_cli.positions import PositionGroup

THREAD = "reft-loader"


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of one optimizer step, and of those this process's share, cut into passes on the host."""

    indices: Sequence[int]
    examples: Examples
    """All rows of the step, those of other processes too."""
    passes: list[Batch]
    token_budget: int
    """What the passes were cut by."""


def dealt(count: int, *, process: int, processes: int) -> list[int]:
    """The numbers of those of `count` ranked rows that a process gets: dealt out to and fro, 0 1 1 0 0 1 for two."""
    rounds = range(-(-count // processes))
    found = (each * processes + (process if each % 2 == 0 else processes - 1 - process) for each in rounds)
    return [number for number in found if number < count]


class Loader:
    """Builds the global batches of some examples.

    `token_budget` may be lowered at any time, after running out of memory say: every batch that is handed out later is
    cut by it. `process` of `processes` is dealt its rows by length, so that all of them work equally. `prepare` is
    done to each pass before it is pinned. With `share_head` a head that the rows of a pass have in common is there
    once.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        groups: Sequence[PositionGroup],
        layout: Layout,
        pad_token_id: int,
        token_budget: int,
        micro_batch_size: int | None,
        process: int = 0,
        processes: int = 1,
        device: torch.device,
        prepare: Callable[[Batch], Batch] | None = None,
        share_head: bool = False,
        lead: int = 2,
    ) -> None:
        self.examples = Examples.of(examples)
        self.groups, self.layout, self.pad_token_id = groups, layout, pad_token_id
        self.token_budget, self.micro_batch_size = token_budget, micro_batch_size
        self.process, self.processes = process, processes
        self.device, self.prepare, self.share_head, self.lead = device, prepare, share_head, lead

    def build(self, indices: Sequence[int]) -> GlobalBatch:
        """The global batch of these examples, at once."""
        budget = self.token_budget
        chosen = self.examples.take(indices)
        mine = chosen.longest_first().take(dealt(len(chosen), process=self.process, processes=self.processes))
        parts = cuts(
            mine.sizes.tolist(), token_budget=budget, rows=self.micro_batch_size, padded=self.layout == "padded"
        )
        return GlobalBatch(indices, chosen, [self._pass(mine[part]) for part in parts], budget)

    def one(self, index: int) -> Batch:
        """One example as a pass."""
        return self._pass(self.examples.take([index]))

    def _pass(self, examples: Examples) -> Batch:
        batch = build_batch(
            examples,
            groups=self.groups,
            layout=self.layout,
            pad_token_id=self.pad_token_id,
            share_head=self.share_head,
        )
        if self.prepare is not None:
            batch = self.prepare(batch)
        return batch.pinned() if self.device.type == "cuda" else batch

    @contextmanager
    def ahead(self, batches: Iterable[Sequence[int]]) -> Iterator[Iterator[GlobalBatch]]:
        """The global batches in their order, up to `lead` of them built before they are asked for.

        An error in building one is raised where that one is taken. However the context is left, the thread has ended.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix=THREAD, initializer=self._use_device)
        try:
            yield self._stream(pool, batches)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _stream(self, pool: ThreadPoolExecutor, batches: Iterable[Sequence[int]]) -> Iterator[GlobalBatch]:
        waiting: deque[Future[GlobalBatch]] = deque()
        for indices in batches:
            waiting.append(pool.submit(self.build, indices))
            if len(waiting) > self.lead:
                yield self._current(waiting.popleft().result())
        while waiting:
            yield self._current(waiting.popleft().result())

    def _current(self, batch: GlobalBatch) -> GlobalBatch:
        """The batch, cut again if the budget was lowered after it was built."""
        return batch if batch.token_budget == self.token_budget else self.build(batch.indices)

    def _use_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # or pinning would claim memory on the first GPU
