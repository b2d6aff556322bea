"""Our side of the benchmarks: the loop's own trainer over a random model and drawn rows, and its single steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from train_sides import BATCHES, ROWS, SHAPES, Plan, draw

from reft_cli.data.examples import Example, Examples
from reft_cli.data.loader import GlobalBatch
from reft_cli.models.build import build_intervened
from reft_cli.models.intervened import IntervenedModel
from reft_cli.models.loading import BaseModel, shape_hash
from reft_cli.models.packing import why_not_packed
from reft_cli.parallel.collective import size
from reft_cli.positions import Positions
from reft_cli.tasks.objectives import TASKS
from reft_cli.training.frozen_cache import why_not_cached
from reft_cli.training.loop import Hooks, Trainer, TrainSettings
from reft_cli.training.observer import NullObserver
from reft_cli.training.passes import why_not_recorded


def examples_of(plan: Plan) -> list[Example]:
    """The drawn rows as examples."""
    drawn = [row for rows in draw(plan.mix, SHAPES[plan.shape][5], BATCHES) for row in rows]
    return [Example(tokens, prompt, None, "", "", row) for row, (tokens, prompt) in enumerate(drawn)]


def intervened_of(model: Any, plan: Plan) -> IntervenedModel:
    """LoReFT as the plan has it on a base."""
    base = BaseModel(model.eval(), plan.shape, None, shape_hash(model))
    return build_intervened(
        base, method="loreft", layers=plan.chosen, component="block_output", positions=Positions.parse(plan.positions),
        tied=True, rank=plan.rank, init="paper", dropout=0.0, dropout_on="delta", seed=0,
    )  # fmt: skip


def trainer_of(
    model: Any,
    plan: Plan,
    *,
    rows: int = ROWS,
    examples: Sequence[Example] | None = None,
    compiled: bool = True,
    recorded: bool = True,
    cached: bool = True,
    shared: bool = False,
    checkpointing: bool = False,
) -> Trainer:
    """The trainer that `reft train` would make for global batches of `rows`, but for what is asked here."""
    intervened, examples = intervened_of(model, plan), examples or examples_of(plan)
    intervened.checkpoint_activations(checkpointing)
    packed, sharded = why_not_packed(model) is None, intervened.is_sharded
    unrecorded = why_not_recorded(intervened, packed=packed, checkpointing=checkpointing, dropout=False)
    uncached = why_not_cached(
        intervened, tokens=len(Examples.of(examples).tokens), packed=packed, repeated=True, processes=size(),
        dropout=False,
    )  # fmt: skip
    settings = TrainSettings(
        epochs=1000, max_steps=None, learning_rate=9e-4, schedule="constant", warmup_ratio=0.0, weight_decay=0.0,
        max_grad_norm=1.0, global_batch_size=rows, micro_batch_size=None, token_budget=plan.budget,
        layout="packed" if packed else "padded", compiled=compiled and not sharded and plan.device == "cuda",
        forgiving=False, recorded=recorded and not sharded and unrecorded is None,
        cached=cached and uncached is None, shared=shared, seed=0,
        log_every=10**9, diverge_factor=1e9, validate_every="never", save_every=10**9, patience=None,
        lower_is_better=True, best_metric="loss",
    )  # fmt: skip
    return Trainer(
        intervened, task=TASKS["causal_lm"], examples=examples,
        groups=Positions.parse(plan.positions).groups(tied=True), pad_token_id=0, settings=settings,
        accelerator=Accelerator(cpu=plan.device == "cpu"), observer=NullObserver(),
        hooks=Hooks(None, lambda *_: None, lambda _: None, lambda *_: None, lambda: None, str),
    )  # fmt: skip


@contextmanager
def stepping(trainer: Trainer) -> Iterator[Callable[[], tuple[torch.Tensor, GlobalBatch]]]:
    """Inside, each call is one optimizer step on the next global batch: its loss and the batch."""
    count, rows = len(trainer.loader.examples), trainer.settings.global_batch_size
    order = itertools.cycle(range(start, start + rows) for start in range(0, count, rows))
    trainer.model.train()
    with trainer.model, trainer.running(), trainer.loader.ahead(order) as batches:

        def step() -> tuple[torch.Tensor, GlobalBatch]:
            batch = next(batches)
            loss, _, _ = trainer._step(batch)
            return loss, batch

        yield step
