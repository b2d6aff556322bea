"""Keeps what the base model gives the answers of each pair, which never changes, so that it is read once and not anew.

The first time that a pair comes it is read without edits, in the batch that it comes in; later epochs take what is
kept, also after resuming. Shapes: E pairs of all data, P of a batch, G of a global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from reft_cli.data.batch import Batch
from reft_cli.data.capacity import NOWHERE
from reft_cli.data.examples import Examples
from reft_cli.models.intervened import IntervenedModel
from reft_cli.parallel.collective import add_up, size
from reft_cli.tasks.preferences import Preference
from reft_cli.training.passes import Passes

NAME = "references"  # in a checkpoint's training state
CERTAIN = (-1e9, 0.0)  # of a pair that was filled in: it is won by so much that it has no loss and no gradient


class ReferencePasses:
    """Passes of pairs that are told what the base model gives their answers. `examples`: all data."""

    def __init__(self, passes: Passes, model: IntervenedModel, task: Preference, examples: Examples) -> None:
        self.passes, self.model, self.task = passes, model, task
        self._order = np.argsort(examples.spans[:, 0])
        self._starts = examples.spans[self._order, 0]  # by which pairs are known; no two begin at one token
        assert (np.diff(self._starts) > 0).all(), "every pair has tokens of its own"
        self._known = np.zeros(len(examples) + 1, dtype=bool)
        self._known[-1] = True
        self._kept = torch.full((len(examples) + 1, 2), torch.nan, device=model.device)  # [E + 1, 2]
        self._kept[-1] = torch.tensor(CERTAIN)
        self._anew = False
        self._read: list[np.ndarray] = []

    def prepare(self, batch: Batch) -> Batch:
        """See Passes."""
        return self.passes.prepare(batch)

    @contextmanager
    def of_step(self, examples: Examples) -> Iterator[None]:
        """Inside are all passes of a step, whose global batch [G] this is; what one process reads, all know after."""
        numbers = self._numbers(examples.spans[:, 0])
        self._anew, self._read = not self._known[numbers].all(), []
        yield
        if self._anew:
            self._share(numbers)
        self._anew = False

    def __call__(self, batch: Batch, units: float) -> Tensor:
        """See Passes."""
        assert batch.beginnings is not None, "a batch of pairs knows where they begin"
        numbers = self._numbers(batch.beginnings.numpy())
        where = torch.from_numpy(numbers).to(self._kept.device, non_blocking=True)
        if self._anew:
            there = batch.to(self.model.device)
            with self.model.editing(None):
                found = self.task.reference(self.model, there)  # [P, 2]
            real = torch.from_numpy(numbers < len(self._starts)).to(found.device)
            self._kept.index_copy_(0, where, torch.where(real[:, None], found, self._kept[-1]))
            self._known[numbers] = True
            self._read.append(numbers)
        return self.passes(replace(batch, reference=self._kept.index_select(0, where)), units)

    def state(self) -> Tensor:
        """What is kept, [E, 2] in the order of the data; NaN: not read yet."""
        return self._kept[:-1].clone()

    def restore(self, kept: Tensor) -> None:
        """Go on with what was kept. ValueError: it is not of these pairs."""
        if kept.shape != self._kept[:-1].shape or kept.dtype != torch.float32:
            raise ValueError(f"{NAME} is {list(kept.shape)} of {kept.dtype}, for {len(self._starts)} pairs")
        self._kept[:-1] = kept.to(self._kept.device)
        self._known[:-1] = ~kept.isnan().any(1).cpu().numpy()

    def _numbers(self, starts: np.ndarray) -> np.ndarray:
        """Which pairs of the data begin at these tokens; those that were filled in: the number after the last."""
        places = np.minimum(np.searchsorted(self._starts, starts), len(self._starts) - 1)
        found: np.ndarray = np.where(starts == NOWHERE, len(self._starts), self._order[places])
        return found

    def _share(self, numbers: np.ndarray) -> None:
        """Give all processes what each has read; two may have read the same pair."""
        if size() == 1:
            return
        mine = np.isin(numbers, np.concatenate(self._read or [numbers[:0]]))
        where = torch.from_numpy(numbers).to(self._kept.device)
        count = torch.from_numpy(mine).to(self._kept)[:, None]  # [G, 1]
        sums = torch.where(count > 0, self._kept.index_select(0, where), 0.0)
        add_up([sums, count])
        self._kept.index_copy_(0, where, sums / count)
        self._known[numbers] = True
