"""Batches: examples as tensors in one of two layouts, with the flat rows that are edited and that answer.

padded: B sequences, right-padded to the longest, with an attention mask.
packed: one row of all sequences end to end, with the positions and boundaries that packed attention needs. A head that
all of them begin with may stand there once: the first sequence is whole, of the others there is what comes after it.

Shapes: B sequences, T tokens of the longest, N rows of h.view(-1, D) (B*T padded, the sum of lengths packed), P tokens
of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reft_cli.data.examples import Example, Examples, Ints, ranges
from reft_cli.data.heads import common_head
from reft_cli.models.packing import packing_inputs
from reft_cli.positions import PositionGroup

Layout = Literal["padded", "packed"]
IGNORED = -100  # a target without a loss


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs.

    `answer_rows[k]` is the row whose next token is `targets[k]`; `labels` are classes or numbers, one an example.
    `places` says which of all tokens of the data each real one is. `frozen` [1, N, D] is what comes out of the blocks
    that no edit reaches, where it is known and they need not run. Of `pairs` examples that are pairs, all chosen
    sequences come first and then all rejected ones. Then `owners[k]` is the sequence of answer row k, `beginnings[p]`
    the place of the first token of pair p, and `reference` [P, 2], where it is known, what the base gives its answers.
    """

    inputs: dict[str, Tensor | int]
    rows: dict[str, Tensor]
    answer_rows: Tensor
    targets: Tensor
    labels: Tensor | None
    places: Tensor
    frozen: Tensor | None = None
    owners: Tensor | None = None
    beginnings: Tensor | None = None
    reference: Tensor | None = None
    pairs: int = 0

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; copies overlap with computation where the memory is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in memory that a GPU can read by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, move: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            inputs={name: move(each) if isinstance(each, Tensor) else each for name, each in self.inputs.items()},
            rows={name: move(tensor) for name, tensor in self.rows.items()},
            answer_rows=move(self.answer_rows),
            targets=move(self.targets),
            labels=None if self.labels is None else move(self.labels),
            places=move(self.places),
            frozen=None if self.frozen is None else move(self.frozen),
            owners=None if self.owners is None else move(self.owners),
            beginnings=None if self.beginnings is None else move(self.beginnings),
            reference=None if self.reference is None else move(self.reference),
        )


def build_batch(
    examples: Sequence[Example],
    *,
    groups: Sequence[PositionGroup],
    layout: Layout,
    pad_token_id: int,
    share_head: bool = False,
) -> Batch:
    """Examples as one batch on the host. Of pairs with labels, every token is read and none is a target.

    `share_head`, packed only: the head that all sequences have in common, if they have one, is there once.
    """
    given = Examples.of(examples)
    chosen, pairs = given.sequences(), len(given) if given.rejected is not None else 0
    prompts, first = chosen.prompt_lengths, chosen.spans[:, 0]  # [B]
    learned_from = np.maximum(prompts, 1)
    learned = np.maximum(chosen.lengths - learned_from, 0) * (not pairs or chosen.labels is None)
    lengths = chosen.lengths - (learned > 0)  # an answer's last token is a target and no input: nothing comes after it
    shared = common_head(chosen, groups=groups) if share_head else 0  # P
    begins = shared * (np.arange(len(chosen)) > 0)  # [B] the first token of each that is there
    rests = lengths - shared
    starts = np.cumsum(rests) - rests if layout == "packed" else int(lengths.max()) * np.arange(len(chosen))
    where = ranges(first + begins, first + lengths)  # [N] of all tokens
    ids = chosen.tokens[where].astype(np.int64)
    if layout == "packed":
        inputs: dict[str, Tensor | int] = {"input_ids": torch.from_numpy(ids[None])}  # [1, N]
        inputs |= packing_inputs(rests.tolist(), head=shared if share_head else None)
    else:
        inputs = _padded(chosen, where, ids, lengths=lengths, pad_token_id=pad_token_id)
    return Batch(
        inputs=inputs,
        rows=_edited(prompts, lengths, groups=groups, starts=starts, begins=begins),
        answer_rows=torch.from_numpy(ranges(starts + learned_from - 1, starts + learned_from - 1 + learned)),
        targets=torch.from_numpy(
            chosen.tokens[ranges(first + chosen.lengths - learned, first + chosen.lengths)].astype(np.int64)
        ),
        labels=None if chosen.labels is None else _labels(chosen.labels),
        places=torch.from_numpy(where),
        owners=torch.from_numpy(np.repeat(np.arange(len(chosen)), learned)) if pairs else None,
        beginnings=torch.from_numpy(first[:pairs]) if pairs else None,
        pairs=pairs,
    )


def _edited(
    prompts: Ints, lengths: Ints, *, groups: Sequence[PositionGroup], starts: Ints, begins: Ints
) -> dict[str, Tensor]:
    """Token j of a sequence is at row start + j, from j = begin on."""
    found, sizes = {}, [each.tolist() for each in (starts, begins, prompts, lengths)]
    for group in groups:
        spans = [
            (start + max(span.start, begin), start + max(span.stop, begin))
            for start, begin, prompt, length in zip(*sizes, strict=True)
            for span in group.ranges(prompt, length)
        ]
        bounds = np.array(spans, dtype=np.int64).reshape(-1, 2)  # [B or 2 B, 2]
        found[group.name] = torch.from_numpy(ranges(bounds[:, 0], bounds[:, 1]))
    return found


def _padded(
    examples: Examples, where: Ints, tokens: Ints, *, lengths: Ints, pad_token_id: int
) -> dict[str, Tensor | int]:
    real = np.arange(lengths.max()) < lengths[:, None]  # [B, T]
    ids = np.full(real.shape, pad_token_id, dtype=np.int64)
    ids[real] = tokens
    inputs: dict[str, Tensor | int] = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(real.astype(np.int64)),
    }
    if examples.token_types is not None:
        types = np.zeros(real.shape, dtype=np.int64)
        types[real] = examples.token_types[where]
        inputs["token_type_ids"] = torch.from_numpy(types)
    return inputs


def _labels(labels: Ints | NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64))


def micro_batches(
    examples: Sequence[Example], *, token_budget: int, rows: int | None, padded: bool
) -> Iterator[list[Example]]:
    """Cut a global batch, sorted by length, into passes of at most `rows` rows or about `token_budget` tokens.

    The order inside a global batch does not change its loss, so sorting costs nothing and saves padding.
    """
    ordered = sorted(examples, key=lambda each: (-each.size, each.row))
    lengths = [each.size for each in ordered]
    for part in cuts(lengths, token_budget=token_budget, rows=rows, padded=padded):
        yield ordered[part]


def cuts(lengths: Sequence[int], *, token_budget: int, rows: int | None, padded: bool) -> Iterator[slice]:
    """The same cut of examples of falling lengths, as slices of them."""
    start = total = 0
    for index, length in enumerate(lengths):
        count = index - start + 1
        cost = lengths[start] * count if padded else total + length
        full = count > rows if rows else cost > token_budget
        if count > 1 and full:
            yield slice(start, index)
            start, total = index, 0
        total += length
    if len(lengths) > start:
        yield slice(start, len(lengths))
