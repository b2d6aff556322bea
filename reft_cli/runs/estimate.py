"""Memory and time of a training run, from the model's shape and the rows' lengths. No step is run.

Floating-point operations of a frozen base: 2 for each weight and token forward, 2 more backward (gradients of
activations only; a full finetuning needs 4), so 4 N T; layers below the lowest edited one go forward only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reft_cli.data.batch import micro_batches
from reft_cli.data.encode import Example
from reft_cli.models.blocks import find_blocks, hidden_size
from reft_cli.models.intervened import IntervenedModel

KEPT_PER_LAYER = (
    34  # values of hidden size that a block keeps a token for its backward pass: attention 11, MLP 19, norms 4
)


@dataclass(frozen=True)
class Estimate:
    """Of a whole run. Bytes are of the device's memory; operations are floating-point ones."""

    weights_bytes: int
    activation_bytes: int
    trainable_bytes: int
    operations: float
    tokens: int

    @property
    def memory_bytes(self) -> int:
        """The peak."""
        return self.weights_bytes + self.activation_bytes + self.trainable_bytes


def estimate(
    model: IntervenedModel,
    *,
    examples: Sequence[Example],
    epochs_steps: int,
    global_batch_size: int,
    micro_batch_size: int | None,
    token_budget: int,
    checkpointing: bool,
) -> Estimate:
    """What `epochs_steps` steps take; the largest micro-batch is the one of the longest rows."""
    longest = sorted(examples, key=lambda each: -len(each.input_ids))[:global_batch_size]
    first = next(micro_batches(longest, token_budget=token_budget, rows=micro_batch_size, padded=True))
    tokens = max(len(each.input_ids) for each in first) * len(first)
    answers = sum(each.learned for each in first)
    blocks, width = len(find_blocks(model.base_model).modules), hidden_size(model.base_model)
    lowest = min(site.layer for site in model.sites)
    parameter = next(model.base_model.parameters())
    kept = 2 * (blocks - lowest) + KEPT_PER_LAYER if checkpointing else KEPT_PER_LAYER * (blocks - lowest)
    vocabulary = int(getattr(model.base_model.config, "vocab_size", 0))
    logits = answers * vocabulary * (parameter.element_size() + 2 * torch.float32.itemsize)
    embedding = vocabulary * width
    body = max(model.base_count() - embedding, 0)
    mean = sum(len(each.input_ids) for each in examples) / len(examples)
    seen = round(mean * min(global_batch_size, len(examples)) * epochs_steps)
    return Estimate(
        weights_bytes=sum(p.numel() * p.element_size() for p in model.base_model.parameters()),
        activation_bytes=tokens * width * kept * parameter.element_size() + logits,
        trainable_bytes=4 * torch.float32.itemsize * model.trainable_count(),
        operations=(2 + 2 * (blocks - lowest) / blocks) * body * seen,
        tokens=seen,
    )
