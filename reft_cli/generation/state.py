"""What the device knows of each slot while answers are decoded, and how a chosen token is noted there.

Shapes: B slots, L tokens a slot has room for, A longest answer, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from reft_cli.generation.choose import Chooser


@dataclass(frozen=True)
class State:
    """What the device knows of each slot; a dead one keeps still."""

    token: Tensor  # [B] the last token, which the next step reads
    alive: Tensor  # [B] bool
    count: Tensor  # [B] tokens of the answer so far
    limit: Tensor  # [B] most tokens of the answer
    stream: Tensor  # [B] where the random numbers begin
    owner: Tensor  # [B] who edits new tokens
    held: Tensor  # [B] tokens of prompt and answer so far
    answer: Tensor  # [B, A + 1], the last column for what nobody reads
    past: Tensor  # [B, L + 1] prompt and answer, or [B, 0] if nobody reads them

    @classmethod
    def empty(cls, *, slots: int, answer: int, past: int, device: torch.device) -> State:
        """Dead slots."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(slots, *shape, dtype=torch.long, device=device)

        return cls(zeros(), zeros().bool(), zeros(), zeros(), zeros(), zeros(), zeros(), zeros(answer + 1), zeros(past))

    def begin(self, *, held: Tensor, stream: Tensor, owner: Tensor, limit: int) -> None:
        """All of them live, and hold a prompt of `held` [B] tokens that is about to be answered."""
        self.alive.fill_(True)
        self.limit.fill_(limit)
        for mine, given in ((self.held, held), (self.stream, stream), (self.owner, owner)):
            mine.copy_(given)

    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the fields."""
        return [getattr(self, each.name) for each in fields(self)]

    def put(self, rows: Tensor, other: State) -> None:
        """Overwrite some slots."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine[rows] = theirs

    def take(self, logits: Tensor, chooser: Chooser) -> None:
        """Choose the next token of every living slot from logits [B, V] and note it."""
        past = self.past if self.past.shape[1] else None
        tokens = chooser.choose(logits, past=past, held=self.held, count=self.count, stream=self.stream)
        _write(self.answer, self.count, tokens, self.alive)
        if past is not None:
            _write(self.past, self.held, tokens, self.alive)
        self.token.copy_(torch.where(self.alive, tokens, self.token))
        self.count.add_(self.alive)
        self.held.add_(self.alive)
        self.alive.logical_and_(~chooser.ended(tokens) & (self.count < self.limit))


def _write(table: Tensor, column: Tensor, values: Tensor, wanted: Tensor) -> None:
    """table[b, column[b]] = values[b] where it is wanted; elsewhere into the last column."""
    at = torch.where(wanted, column, table.shape[1] - 1)
    table.scatter_(1, at[:, None], values[:, None])
