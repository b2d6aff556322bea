"""The learning rate and the order of rows, both as pure functions of the step, so that resuming is arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

EPOCH_STRIDE = 1_000_003  # a prime, so that neighbouring seeds do not share the orders of neighbouring epochs


def rate_factor(step: int, *, steps: int, warmup_steps: int, schedule: str) -> float:
    """Factor of the peak learning rate at optimizer step `step` (from 0).

    Rises linearly over the warm-up; then linear: to 0 at `steps`; cosine: (1 + cos πx) / 2; constant: 1.
    The same as transformers' get_*_schedule_with_warmup.
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return 1.0


@dataclass(frozen=True)
class Order:
    """Which rows an optimizer step sees: every epoch a new permutation of all rows, drawn from the seed.

    The last global batch of an epoch may be smaller.
    """

    rows: int
    global_batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return math.ceil(self.rows / self.global_batch_size)

    def steps(self, epochs: float, max_steps: int | None) -> int:
        """Optimizer steps of the whole run."""
        steps = max(1, math.ceil(epochs * self.steps_per_epoch - 1e-9))
        return min(steps, max_steps) if max_steps else steps

    def permutation(self, epoch: int) -> list[int]:
        """The rows of an epoch (from 0) in order."""
        generator = torch.Generator().manual_seed(self.seed * EPOCH_STRIDE + epoch)
        order: list[int] = torch.randperm(self.rows, generator=generator).tolist()
        return order

    def global_batch(self, step: int, permutation: Sequence[int]) -> Sequence[int]:
        """The rows of optimizer step `step` (from 0), given its epoch's permutation."""
        start = (step % self.steps_per_epoch) * self.global_batch_size
        return permutation[start : start + self.global_batch_size]
