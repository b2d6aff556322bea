"""Batches: examples as tensors in one of two layouts, with the flat rows that are edited and that answer.

padded: B sequences, right-padded to the longest, with an attention mask.
packed: one row of all sequences end to end, with the positions and boundaries that packed attention needs.

Shapes: B sequences, T tokens of the longest, N rows of h.view(-1, D) (B*T padded, the sum of lengths packed).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from reft_cli.data.encode import Example
from reft_cli.models.packing import packing_inputs
from reft_cli.positions import PositionGroup

Layout = Literal["padded", "packed"]
IGNORED = -100  # a target without a loss


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs.

    `answer_rows[k]` is the row whose next token is `targets[k]`; `labels` are classes or numbers, one an example.
    """

    inputs: dict[str, Tensor | int]
    rows: dict[str, Tensor]
    answer_rows: Tensor
    targets: Tensor
    labels: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; copies overlap with computation where the memory is pinned."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            inputs={name: move(each) if isinstance(each, Tensor) else each for name, each in self.inputs.items()},
            rows={name: move(tensor) for name, tensor in self.rows.items()},
            answer_rows=move(self.answer_rows),
            targets=move(self.targets),
            labels=None if self.labels is None else move(self.labels),
        )


def build_batch(
    examples: Sequence[Example],
    *,
    groups: Sequence[PositionGroup],
    layout: Layout,
    pad_token_id: int,
) -> Batch:
    """Examples as one batch on the host."""
    lengths = [len(example.input_ids) for example in examples]
    width = max(lengths)
    if layout == "padded":
        starts = [index * width for index in range(len(examples))]
        inputs = _padded(examples, width, pad_token_id)
    else:
        starts = [0, *accumulate(lengths[:-1])]
        inputs = _packed(examples)
    answer_rows = [
        start + token
        for start, example, length in zip(starts, examples, lengths, strict=True)
        for token in range(max(example.prompt_length, 1) - 1, length - 1)
    ]
    targets = [token for example in examples for token in example.input_ids[max(example.prompt_length, 1) :]]
    return Batch(
        inputs=inputs,
        rows=edited_rows(examples, groups=groups, starts=starts),
        answer_rows=torch.tensor(answer_rows, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        labels=_labels(examples),
    )


def edited_rows(
    examples: Sequence[Example], *, groups: Sequence[PositionGroup], starts: Sequence[int]
) -> dict[str, Tensor]:
    """For each position group the flat rows that it edits; `starts` is the row of each example's first token."""
    return {
        group.name: torch.tensor(
            [
                start + token
                for start, example in zip(starts, examples, strict=True)
                for token in group.indices(example.prompt_length, len(example.input_ids))
            ],
            dtype=torch.long,
        )
        for group in groups
    }


def _padded(examples: Sequence[Example], width: int, pad_token_id: int) -> dict[str, Tensor | int]:
    ids = torch.full((len(examples), width), pad_token_id, dtype=torch.long)  # [B, T]
    mask = torch.zeros(len(examples), width, dtype=torch.long)  # [B, T]
    for index, example in enumerate(examples):
        ids[index, : len(example.input_ids)] = torch.tensor(example.input_ids)
        mask[index, : len(example.input_ids)] = 1
    inputs: dict[str, Tensor | int] = {"input_ids": ids, "attention_mask": mask}
    if examples[0].token_types is not None:
        types = torch.zeros(len(examples), width, dtype=torch.long)  # [B, T]
        for index, example in enumerate(examples):
            types[index, : len(example.input_ids)] = torch.tensor(example.token_types)
        inputs["token_type_ids"] = types
    return inputs


def _packed(examples: Sequence[Example]) -> dict[str, Tensor | int]:
    ids = torch.tensor([[token for example in examples for token in example.input_ids]])  # [1, N]
    return {"input_ids": ids} | packing_inputs([len(example.input_ids) for example in examples])


def _labels(examples: Sequence[Example]) -> Tensor | None:
    labels = [example.label for example in examples]
    if labels[0] is None:
        return None
    return torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.long)


def micro_batches(
    examples: Sequence[Example], *, token_budget: int, rows: int | None, padded: bool
) -> Iterator[list[Example]]:
    """Cut a global batch, sorted by length, into passes of at most `rows` rows or about `token_budget` tokens.

    The order inside a global batch does not change its loss, so sorting costs nothing and saves padding.
    """
    pending: list[Example] = []
    longest = total = 0
    for example in sorted(examples, key=lambda each: (-len(each.input_ids), each.row)):
        length = len(example.input_ids)
        longest, grown = max(longest, length), total + length
        cost = longest * (len(pending) + 1) if padded else grown
        full = len(pending) == rows if rows else cost > token_budget
        if pending and full:
            yield pending
            pending, longest, grown = [], length, length
        pending.append(example)
        total = grown
    if pending:
        yield pending
