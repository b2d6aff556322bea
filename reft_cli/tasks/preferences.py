"""Objectives on pairs: a reward for either answer, and the loss that asks for more of it for the chosen one.

Shapes: P pairs, 2 P sequences (all chosen ones, then all rejected ones), K answer tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from reft_cli.data.batch import Batch
from reft_cli.data.examples import Example
from reft_cli.models.intervened import IntervenedModel
from reft_cli.tasks.likelihood import log_probabilities
from reft_cli.tasks.objectives import TASKS, Task, predict


class PairTask(Task, Protocol):
    """A task whose rows are pairs."""

    def rewards(self, model: IntervenedModel, batch: Batch) -> Tensor:
        """Of the chosen and the rejected answers, [P, 2], float32."""
        ...


def pair_loss(rewards: Tensor) -> Tensor:
    """Σ −log σ(reward of the chosen − reward of the rejected) of rewards [P, 2]; the Bradley-Terry model."""
    return -logsigmoid(rewards[:, 0] - rewards[:, 1]).sum()


def sequence_log_probabilities(model: IntervenedModel, batch: Batch) -> Tensor:
    """log p(answer | prompt) of every sequence, [P, 2]: chosen, rejected. Only inside `model.editing`."""
    assert batch.owners is not None, "a batch of pairs knows whose each answer row is"
    each = log_probabilities(model, batch)  # [K]
    sums = each.new_zeros(2 * batch.pairs + 1).index_add(0, batch.owners, each)  # the last: of rows that were filled in
    return sums[:-1].view(2, batch.pairs).T


@dataclass(frozen=True)
class Preference:
    """Direct preference optimization (Rafailov et al., 2023, arXiv 2305.18290), the reference being the model itself.

    reward = β (log p(answer | prompt) − log p_reference(answer | prompt)). The reference is the base with its
    interventions off, so that no second model is loaded.
    """

    beta: float
    can_pack: bool = True

    def rewards(self, model: IntervenedModel, batch: Batch) -> Tensor:
        """See PairTask. Zero, and exactly so, where nothing is edited."""
        reference = batch.reference
        if reference is None:
            with model.editing(None):
                reference = self.reference(model, batch)
        return self.beta * (sequence_log_probabilities(model, batch) - reference)

    @torch.no_grad()
    def reference(self, model: IntervenedModel, batch: Batch) -> Tensor:
        """log p_reference(answer | prompt), [P, 2]: chosen, rejected. Only inside `model.editing(None)`."""
        return sequence_log_probabilities(model, batch)

    def loss(self, model: IntervenedModel, batch: Batch) -> Tensor:
        """See Task."""
        return pair_loss(self.rewards(model, batch))

    def units(self, examples: Sequence[Example]) -> int:
        """Pairs."""
        return len(examples)


@dataclass(frozen=True)
class Reward:
    """A reward model: the reward is the head's one number, read at the last token of prompt and answer."""

    can_pack: bool = False

    def rewards(self, model: IntervenedModel, batch: Batch) -> Tensor:
        """See PairTask."""
        return predict(model, batch).view(2, batch.pairs).T  # [2 P, 1]

    def loss(self, model: IntervenedModel, batch: Batch) -> Tensor:
        """See Task."""
        return pair_loss(self.rewards(model, batch))

    def units(self, examples: Sequence[Example]) -> int:
        """Pairs."""
        return len(examples)


def pair_task_of(kind: str, *, beta: float | None) -> PairTask | None:
    """The objective of a kind of task that learns from pairs; None for others."""
    if kind == "preference":
        assert beta is not None, "a spec's preference task has a beta"
        return Preference(beta)
    return Reward() if kind == "reward" else None


def task_of(kind: str, *, beta: float | None = None) -> Task:
    """The objective of a kind of task."""
    return pair_task_of(kind, beta=beta) or TASKS[kind]
