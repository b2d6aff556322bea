"""`check`: what a spec would do, before anything is trained."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from typing import Any

from reft_cli.data.encode import Encoded
from reft_cli.data.report import DataReport, Token, render_row, report
from reft_cli.models.loading import load_tokenizer
from reft_cli.runs.assemble import (
    base_source,
    build_from_spec,
    check_lengths,
    load_base,
    token_budget,
)
from reft_cli.runs.estimate import Estimate, estimate
from reft_cli.runs.execution import Execution, choose_execution
from reft_cli.runs.sources import rows_of
from reft_cli.runs.texts import TrainingData, load_training_data
from reft_cli.spec.load import LoadedSpec
from reft_cli.tasks.preferences import task_of
from reft_cli.training.schedule import Order


@dataclass(frozen=True)
class RenderedRow:
    """One training row, token by token; of a pair there are two, the chosen answer first."""

    row: int
    tokens: list[Token]


@dataclass(frozen=True)
class SuiteReport:
    """What a suite brought to a spec."""

    name: str
    recipe: str | None
    keys: list[str]
    """Keys whose value is the suite's."""
    replaced: list[str]
    """Keys of the suite that the spec gives another value."""
    notes: list[str]
    """What was published otherwise, or cannot be known."""


@dataclass(frozen=True)
class CheckReport:
    """What `reft check` shows. The model's numbers are None without a model, the suite's without a suite."""

    spec: str
    suite: SuiteReport | None
    data: dict[str, DataReport]
    rows: list[RenderedRow]
    steps: int
    steps_per_epoch: int
    model: ModelReport | None
    next_command: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for --json."""
        return {
            "spec": self.spec,
            "suite": asdict(self.suite) if self.suite else None,
            "data": {split: each.to_dict() for split, each in self.data.items()},
            "rows": [asdict(row) for row in self.rows],
            "steps": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "model": self.model.to_dict() if self.model else None,
            "next_command": self.next_command,
        }

    @property
    def warnings(self) -> list[str]:
        """What should be known before training."""
        return [warning for each in self.data.values() for warning in each.warnings]


@dataclass(frozen=True)
class ModelReport:
    """What the intervention is on this model, and what training it would take."""

    name: str
    device: str
    dtype: str
    base_parameters: int
    trainable_parameters: int
    head_parameters: int
    sites: int
    layers: list[int]
    places: dict[str, int]
    """How many blocks lie where, if the base lies on several devices."""
    component: str
    width: int
    arithmetic: str
    """How the trainable parameters come about."""
    execution: Execution
    estimate: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for --json."""
        return asdict(self) | {"execution": self.execution.to_dict()}

    @property
    def percent(self) -> float:
        """Trainable parameters of a hundred of the base."""
        return 100 * self.trainable_parameters / self.base_parameters


def check(loaded: LoadedSpec, *, with_model: bool = True, rows: int = 1) -> CheckReport:
    """Read the data and, unless `with_model` is false, load the model; nothing is written.

    Every problem that training would meet at its start comes here too, as the same error.
    """
    spec = loaded.spec
    tokenizer = load_tokenizer(base_source(spec.model))
    data = load_training_data(spec, tokenizer)
    encoded: dict[str, Encoded] = {"train": data.train}
    if data.validation is not None:
        encoded["validation"] = data.validation
    if spec.data.test is not None:
        encoded["test"] = data.text.encode(rows_of(spec, "test"))
    groups = data.text.positions.groups(tied=spec.intervention.tied)
    order = Order(len(data.train.examples), spec.train.global_batch_size, spec.train.seed)
    steps = order.steps(spec.train.epochs, spec.train.max_steps)
    return CheckReport(
        spec=str(loaded.path),
        suite=_suite_report(loaded),
        data={
            split: report(
                each, positions=data.text.positions, training=data.train if split in ("validation", "test") else None
            )
            for split, each in encoded.items()
        },
        rows=[
            RenderedRow(each.row, render_row(sequence, tokenizer=tokenizer, groups=groups))
            for each in data.train.examples[:rows]
            for sequence in filter(None, (each, each.rejected))
        ],
        steps=steps,
        steps_per_epoch=order.steps_per_epoch,
        model=_model_report(loaded, data, steps=steps) if with_model else None,
        next_command=shlex.join(["reft", "train", str(loaded.path)]),
    )


def _suite_report(loaded: LoadedSpec) -> SuiteReport | None:
    if loaded.preset is None:
        return None
    recipe, (keys, replaced) = loaded.preset.recipe, loaded.of_the_suite
    name = loaded.preset.suite.name
    return SuiteReport(name, recipe.name if recipe else None, keys, replaced, list(loaded.preset.notes))


def _model_report(loaded: LoadedSpec, data: TrainingData, *, steps: int) -> ModelReport:
    spec = loaded.spec
    base = load_base(base_source(spec.model), data.text, seed=spec.train.seed)
    check_lengths(base, data, spec)
    model = build_from_spec(base, spec)
    bank, head = model.bank, sum(parameter.numel() for parameter in model.head_parameters().values())
    per_site = sum(parameter.numel() for parameter in bank.parameters()) // bank.sites
    parts = f"{bank.sites} sites × {per_site:,}" + (f" + head {head:,}" if head else "")
    dtype = next(base.model.parameters()).dtype
    execution = choose_execution(model, spec, data.train.examples)
    return ModelReport(
        name=base.name,
        device=str(model.device),
        dtype=str(dtype).removeprefix("torch."),
        base_parameters=model.base_count(),
        trainable_parameters=model.trainable_count(),
        head_parameters=head,
        sites=len(model.sites),
        layers=sorted({site.layer for site in model.sites}),
        places=model.places,
        component=spec.intervention.component,
        width=bank.width,
        arithmetic=f"{parts} (width {bank.width}, rank {bank.rank or '–'})",
        execution=execution,
        estimate=estimate(
            model,
            task_of(spec.task.kind, beta=spec.task.beta),
            examples=data.train.examples,
            groups=model.groups,
            layout=execution.layout,
            pad_token_id=data.text.tokenizer.pad_token_id or 0,
            steps=steps,
            global_batch_size=spec.train.global_batch_size,
            micro_batch_size=None if spec.train.micro_batch_size == "auto" else spec.train.micro_batch_size,
            token_budget=token_budget(model.device),
            checkpointing=spec.train.gradient_checkpointing,
            compiled=execution.compiled.taken,
            recorded=execution.recorded.taken,
            shared=execution.shared.taken,
        ),
    )
