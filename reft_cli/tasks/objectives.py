"""The objectives: the summed loss of a batch, and how many units (answer tokens or rows) it is the sum over.

The loop divides by the units of the whole global batch, so neither micro-batches nor processes change the mean.

Shapes: B rows, K answer tokens, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from reft_cli.data.batch import IGNORED, Batch
from reft_cli.data.examples import Example, Examples
from reft_cli.models.intervened import IntervenedModel
from reft_cli.tasks.cross_entropy import linear_cross_entropy


class Task(Protocol):
    """What training needs to know of an objective."""

    @property
    def can_pack(self) -> bool:
        """Whether sequences may stand end to end in one row."""
        ...

    def loss(self, model: IntervenedModel, batch: Batch) -> Tensor:
        """The loss summed over the batch's units, float32, scalar."""
        ...

    def units(self, examples: Sequence[Example]) -> int:
        """How many units the loss of these examples is summed over."""
        ...


@dataclass(frozen=True)
class CausalLM:
    """Σ −log p(token | what stands before it) over answer tokens; the prompt is not learned."""

    can_pack: bool = True

    def loss(self, model: IntervenedModel, batch: Batch) -> Tensor:
        """Cross-entropy in nats; logits are formed at answer rows only, and where they can, chunk by chunk."""
        head = model.linear_head
        if head is not None and head.weight.dtype != torch.float16:  # whose gradients vanish before they are scaled
            h = model.answers_at(batch.inputs, batch.answer_rows)  # [K, D]
            return linear_cross_entropy(h, head.weight, head.bias, batch.targets.to(h.device), fused=model.fused)
        logits = model.logits_at(batch.inputs, batch.answer_rows)  # [K, V]
        return cross_entropy(logits.float(), batch.targets, ignore_index=IGNORED, reduction="sum")

    def units(self, examples: Sequence[Example]) -> int:
        """Answer tokens."""
        return int(Examples.of(examples).learned.sum())


def predict(model: IntervenedModel, batch: Batch) -> Tensor:
    """The head's numbers [B, C]; for regression C is 1."""
    logits: Tensor = model.base_model(**batch.inputs).logits
    return logits.float()


@dataclass(frozen=True)
class Classification:
    """Σ −log p(class | row)."""

    can_pack: bool = False

    def loss(self, model: IntervenedModel, batch: Batch) -> Tensor:
        """Cross-entropy in nats."""
        return self.loss_of(predict(model, batch), batch)

    def loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The loss of the head's numbers [B, C]."""
        assert batch.labels is not None, "a classification batch has labels"
        return cross_entropy(outputs, batch.labels, reduction="sum")

    def units(self, examples: Sequence[Example]) -> int:
        """Rows."""
        return len(examples)


@dataclass(frozen=True)
class Regression:
    """Σ (prediction − number)²."""

    can_pack: bool = False

    def loss(self, model: IntervenedModel, batch: Batch) -> Tensor:
        """Squared error."""
        return self.loss_of(predict(model, batch), batch)

    def loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The loss of the head's numbers [B, 1]."""
        assert batch.labels is not None, "a regression batch has numbers"
        return mse_loss(outputs.squeeze(-1), batch.labels.float(), reduction="sum")

    def units(self, examples: Sequence[Example]) -> int:
        """Rows."""
        return len(examples)


HEADS: dict[str, Classification | Regression] = {"classification": Classification(), "regression": Regression()}
TASKS: dict[str, Task] = {"causal_lm": CausalLM(), **HEADS}
