"""Memory and time of a training run: by shapes and lengths, and by one pass where that is quick."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reft_cli.data.batch import Batch, Layout, build_batch, micro_batches
from reft_cli.data.examples import Example, Examples
from reft_cli.models.attention import SHARED_HEAD
from reft_cli.models.intervened import IntervenedModel
from reft_cli.positions import PositionGroup
from reft_cli.runs.memory import RECORDED, memory_parts_of
from reft_cli.tasks.objectives import Task
from reft_cli.training.budget import is_out_of_memory
from reft_cli.training.passes import longest_recorded

QUICK = 2e12  # operations of a pass that may be tried on a CPU: some tens of seconds


@dataclass(frozen=True)
class Estimate:
    """Of a whole run. Bytes are of the device's memory, operations floating-point ones."""

    weights_bytes: int
    activation_bytes: int
    trainable_bytes: int
    pass_tokens: int
    """Tokens of the heaviest micro-batch, for which the bytes are."""
    operations: float
    tokens: int
    seconds: float | None
    """All training steps, by the time of one pass over the longest rows; None if that would take long here."""
    measured_bytes: int | None
    """Peak of that pass, where the device counts it; None if training is compiled or recorded or shares heads."""

    @property
    def memory_bytes(self) -> int:
        """The peak: measured, else what the parts add up to."""
        return self.measured_bytes or self.predicted_bytes

    @property
    def predicted_bytes(self) -> int:
        """What the parts add up to."""
        return self.weights_bytes + self.activation_bytes + self.trainable_bytes


def estimate(
    model: IntervenedModel,
    task: Task,
    *,
    examples: Sequence[Example],
    groups: Sequence[PositionGroup],
    layout: Layout,
    pad_token_id: int,
    steps: int,
    global_batch_size: int,
    micro_batch_size: int | None,
    token_budget: int,
    checkpointing: bool,
    compiled: bool,
    recorded: bool,
    shared: bool,
) -> Estimate:
    """What `steps` steps take; the largest micro-batch is the one of the longest rows.

    The pass that is tried is neither compiled nor recorded, which would take long; it tells no memory of such a run.
    Where rows share a head it is read once in that pass, and memory is for one whose rows share none.
    """
    columns = Examples.of(examples)
    longest = columns.longest_first()[:global_batch_size]
    first = next(micro_batches(longest, token_budget=token_budget, rows=micro_batch_size, padded=layout == "padded"))
    batch = build_batch(first, groups=groups, layout=layout, pad_token_id=pad_token_id, share_head=shared)
    lengths = [each.size for each in first]
    tokens = sum(lengths) if layout == "packed" else max(lengths) * len(lengths)
    seen = tokens_of(columns, global_batch_size=global_batch_size, steps=steps)
    saved = int(batch.inputs.get(SHARED_HEAD, 0)) * (len(first) - 1) / tokens
    for_each_token = model.operations_a_token() * (1 - saved)
    parts = memory_parts_of(
        model, task, examples=columns, groups=groups, layout=layout, checkpointing=checkpointing, compiled=compiled
    )
    recorded = recorded and tokens <= longest_recorded(model)
    seconds = measured = None
    if model.device.type != "cpu" or for_each_token * tokens < QUICK:
        model.checkpoint_activations(checkpointing)
        try:
            seconds, measured = _try_pass(model, task, batch.to(model.device), packed=layout == "packed")
            seconds *= seen / tokens
        except RuntimeError as error:  # a run would find smaller passes
            if not is_out_of_memory(error):
                raise
        model.checkpoint_activations(False)
    return Estimate(
        weights_bytes=parts.weights,
        activation_bytes=round((RECORDED if recorded else 1) * parts.working(tokens, len(batch.targets))),
        trainable_bytes=parts.trained,
        pass_tokens=tokens,
        operations=for_each_token * seen,
        tokens=seen,
        seconds=seconds,
        measured_bytes=None if compiled or recorded or shared else measured,
    )


def tokens_of(examples: Sequence[Example], *, global_batch_size: int, steps: int) -> int:
    """Tokens of a whole run."""
    columns = Examples.of(examples)
    mean = columns.token_count / len(columns)
    return round(mean * min(global_batch_size, len(examples)) * steps)


def _try_pass(model: IntervenedModel, task: Task, batch: Batch, *, packed: bool) -> tuple[float, int | None]:
    """(seconds, peak bytes) of one forward and backward pass, the second of two; no weight is changed."""
    gpus, seconds = [device for device in model.devices if device.type == "cuda"], 0.0
    for device in gpus:
        torch.cuda.reset_peak_memory_stats(device)
    model.train()
    with model, model.packing(packed):
        for _ in range(2):
            started = time.perf_counter()
            model.bank.refresh()
            with model.editing(batch.rows):
                task.loss(model, batch).backward()
            model.bank.backpropagate()
            for device in gpus:
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
    model.bank.zero_grad()
    model.eval()
    return seconds, sum(map(torch.cuda.max_memory_allocated, gpus)) if gpus else None
