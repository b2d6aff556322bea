"""Keeps what comes out of the frozen blocks below the lowest edit, so that later epochs do not run them again.

Shapes: N tokens of a batch, A tokens of all data, D hidden size.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from reft_cli.data.batch import Batch
from reft_cli.models.blocks import hidden_size
from reft_cli.models.intervened import IntervenedModel
from reft_cli.training.passes import Passes, PlainPasses

FEWEST_BLOCKS = 2  # frozen ones; fewer are not worth the memory
SHARE = 0.4  # of the device's free memory that may be taken


def cache_bytes(model: IntervenedModel, tokens: int) -> int:
    """Memory of the frozen activations of so many tokens."""
    weight = next(model.base_model.parameters())
    return tokens * hidden_size(model.base_model) * weight.element_size()


def why_not_cached(
    model: IntervenedModel, *, tokens: int, packed: bool, repeated: bool, processes: int, dropout: bool
) -> str | None:
    """None if caching pays and is exact, else the reason. `repeated`: rows are seen more than once."""
    count = len(model.frozen.modules)
    if count < FEWEST_BLOCKS:
        return f"only {count} of {model.block_count} blocks lie below the lowest edit"
    if not repeated:
        return "no row is seen twice"
    if not packed:
        return "batches are padded"
    if dropout:
        return "the base's dropout is on"
    if processes > 1:
        return "each process sees other rows in every epoch"
    if model.device.type == "cuda":
        wanted, free = cache_bytes(model, tokens), torch.cuda.mem_get_info(model.device)[0]
        if wanted > SHARE * free:
            return (
                f"{wanted / 2**30:.1f} GiB of activations are more than {SHARE:.0%} of the {free / 2**30:.1f} GiB free"
            )
    return None


class CachedPasses:
    """Passes that skip the frozen blocks for batches whose tokens were all seen before. `tokens`: of all data."""

    def __init__(self, passes: Passes, plain: PlainPasses, *, tokens: int) -> None:
        self.passes, self.plain, self.model = passes, plain, plain.model
        weight = next(self.model.base_model.parameters())
        shape = (tokens + 1, hidden_size(self.model.base_model))  # the last row is for what was filled in
        self._kept = torch.empty(shape, dtype=weight.dtype, device=weight.device)  # [A + 1, D]
        self._known = np.zeros(tokens + 1, dtype=bool)
        self._known[-1] = True

    def prepare(self, batch: Batch) -> Batch:
        """See Passes."""
        return self.passes.prepare(batch)

    def __call__(self, batch: Batch, units: float) -> Tensor:
        """See Passes."""
        places = batch.places % len(self._known)
        there = places.to(self._kept.device, non_blocking=True)
        if self._known[places.numpy()].all():
            return self.passes(replace(batch, frozen=self._kept.index_select(0, there)[None]), units)
        with self.model.frozen.kept() as kept:
            loss = self.plain(batch, units)
        self._kept.index_copy_(0, there, kept[-1].flatten(0, 1))  # the last: the model may have been tried before
        self._known[places.numpy()] = True
        return loss
