"""Reading one prompt as a captured pass: starting its kernels one by one takes a GPU's host longer than running them.

The prompt is filled up with tokens that nobody attends to, since they stand behind it, to one of a few lengths, each of
which is captured once; what they leave in the slot is overwritten before it is seen. The pass chooses the first token
and puts the slot's state in place. All that differs between prompts goes over in one copy.

Shapes: N tokens of the filled prompt, C edited rows, some of them twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reft_cli.generation.choose import Chooser
from reft_cli.generation.state import State
from reft_cli.models.capturing import NotCaptured, capture, run_aside
from reft_cli.models.context import longest_sequence
from reft_cli.models.packing import packing_inputs
from reft_cli.models.slots import SlotCache, packed_logits
from reft_cli.models.stacked import Live, Stack

LONGEST = 1024  # tokens; longer ones keep a GPU busy by themselves
Kind = tuple[int, int, bool]  # rounded tokens, rounded edited rows, and whether a checkpoint is in the weights


@dataclass(frozen=True)
class Pass:
    """A captured pass and where it reads from: one tensor [N + 2 C + 4]."""

    graph: torch.cuda.CUDAGraph
    numbers: Tensor


class PromptGraphs:
    """Captured passes over one prompt, for each rounded length and number of edited rows."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: SlotCache,
        stack: Stack,
        state: State,
        chooser: Chooser,
        *,
        limit: int,
    ) -> None:
        self.model, self.cache, self.stack = model, cache, stack
        self.state, self.chooser, self.limit = state, chooser, limit
        self.why_not: str | None = None
        self._longest = min(LONGEST, cache.room, longest_sequence(model) or LONGEST)
        self._met: set[Kind] = set()
        self._passes: dict[Kind, Pass] = {}
        self._inputs: dict[int, dict[str, Tensor | int]] = {}  # what else a pass reads, by its width

    def read(
        self,
        prompt: Sequence[int],
        *,
        slot: int,
        edited: tuple[list[int], list[int]],
        stream: int,
        owner: int,
        merged: bool,
    ) -> bool:
        """Whether it was read. The first prompt of a kind is not: one alone is faster read plainly than captured.

        `edited`: tokens of the prompt, and who edits each.
        """
        count = len(edited[0])
        width, rows = rounded(len(prompt)), rounded_rows(count)
        key = (width, rows, merged)
        if self.why_not is not None or width > self._longest:
            return False
        if key not in self._met:
            self._met.add(key)
            return False
        filled = [each[-1:] * (rows - count) for each in edited]  # an edit is made of what was there before
        numbers = [*prompt, *[0] * (width - len(prompt)), len(prompt), slot, stream, owner]
        for each, more in zip(edited, filled, strict=True):
            numbers += each + more
        given = torch.tensor(numbers)
        return self._replay(key, given) if key in self._passes else self._first(key, given, slot)

    def _replay(self, key: Kind, given: Tensor) -> bool:
        self._passes[key].numbers.copy_(given)
        self._passes[key].graph.replay()
        return True

    def _first(self, key: Kind, given: Tensor, slot: int) -> bool:
        """Capture a pass, and see that what it leaves in the slot is what the pass leaves that is not captured."""
        if not self._capture(key, given):
            return False
        plain = [tensor[slot].clone() for tensor in self.state.tensors()]
        self._replay(key, given)
        if all(torch.equal(each, tensor[slot]) for each, tensor in zip(plain, self.state.tensors(), strict=True)):
            return True
        self._passes.clear()
        self.why_not = "a captured pass left something else"
        return False

    def _capture(self, key: Kind, given: Tensor) -> bool:
        """Capture a pass; it runs once before, as libraries want it. A model whose pass cannot be is read plainly."""
        width = key[0]
        numbers = given.to(self.model.device)
        self._inputs.setdefault(width, packing_inputs([width], self.model.device))
        pool = next(iter(self._passes.values())).graph.pool() if self._passes else None

        def run() -> None:
            self._pass(key, numbers)

        run_aside(run)
        try:
            graph = capture(run, pool=pool)
        except NotCaptured as reason:
            self.why_not = str(reason)
            return False
        self._passes[key] = Pass(graph, numbers)
        return True

    def _pass(self, key: Kind, numbers: Tensor) -> None:
        """What is captured: nothing in it depends on the values of tensors."""
        width, rows, _ = key
        ids, (held, slot, stream, owner) = numbers[:width], numbers[width : width + 4].split(1)
        edited = numbers[width + 4 :].view(2, rows)
        self.stack.live = Live(edited[0], edited[1]) if rows else None
        self.cache.written, self.cache.begun = (slot.expand(width), self.cache.columns[:width]), 0
        self.cache.lengths.index_copy_(0, slot, held)
        logits = packed_logits(self.model, self.cache, ids[None], held - 1, self._inputs[width])
        past = self.state.past.shape[1]
        fresh = State.empty(slots=1, answer=self.limit, past=past, device=self.model.device)
        fresh.begin(held=held, stream=stream, owner=owner, limit=self.limit)
        if past:
            fresh.past[0, :width] = ids
        fresh.take(logits, self.chooser)
        self.state.put(slot, fresh)


def rounded(tokens: int) -> int:
    """Room for so many tokens: 64, 128 or 256, then multiples of 256."""
    return next((size for size in (64, 128) if tokens <= size), -(-tokens // 256) * 256)


def rounded_rows(rows: int) -> int:
    """Room for so many edited rows: 0, 16, or as for tokens."""
    return next((size for size in (0, 16) if rows <= size), rounded(rows))
