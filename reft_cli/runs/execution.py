"""How a run is carried out: packed, compiled, recorded, cached, with shared heads; or not, each with the reason why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from reft_cli.data.batch import Layout
from reft_cli.data.examples import Example, Examples
from reft_cli.data.heads import LEAST, typical_head
from reft_cli.errors import ModelError
from reft_cli.kinds import WRITING
from reft_cli.models.causality import sees_ahead
from reft_cli.models.compiling import why_not_compiled
from reft_cli.models.intervened import IntervenedModel
from reft_cli.models.packing import why_not_packed, why_not_shared
from reft_cli.models.placement import is_offloaded
from reft_cli.parallel.collective import size
from reft_cli.runs.estimate import tokens_of
from reft_cli.spec.schema import Spec
from reft_cli.tasks.objectives import Task
from reft_cli.tasks.preferences import task_of
from reft_cli.training.frozen_cache import why_not_cached
from reft_cli.training.passes import why_not_recorded
from reft_cli.training.schedule import Order

# Floating-point operations of a run from which compiling wins back its time: on an H200 it takes 10 to 40 seconds and
# saves a third of a step of a model of 1B parameters (1.6e13 operations), a sixth at 8B (1.1e14).
WORTH_COMPILING = 5e16
SPREAD = "the base lies on several devices"


@dataclass(frozen=True)
class Choice:
    """Whether a faster way is taken. A reason says why it is not; None if it is, or if the spec asked for this."""

    taken: bool
    reason: str | None = None

    @classmethod
    def unless(cls, reason: str | None) -> Choice:
        """Taken, unless there is a reason against it."""
        return cls(reason is None, reason)


@dataclass(frozen=True)
class Execution:
    """What was chosen."""

    packed: Choice
    compiled: Choice
    recorded: Choice
    cached: Choice
    shared: Choice

    @property
    def layout(self) -> Layout:
        """How batches are laid out."""
        return "packed" if self.packed.taken else "padded"

    def to_dict(self) -> dict[str, str | bool | None]:
        """Plain values, for --json and run.json."""
        return {
            "layout": self.layout,
            "layout_reason": self.packed.reason,
            "compiled": self.compiled.taken,
            "compile_reason": self.compiled.reason,
            "recorded": self.recorded.taken,
            "record_reason": self.recorded.reason,
            "cached": self.cached.taken,
            "cache_reason": self.cached.reason,
            "shared": self.shared.taken,
            "share_reason": self.shared.reason,
        }


def choose_execution(model: IntervenedModel, spec: Spec, examples: Sequence[Example]) -> Execution:
    """The fastest exact way to train on these rows. ModelError: the spec insists on a way that is not open."""
    batch = spec.train.global_batch_size
    steps = Order(len(examples), batch, spec.train.seed).steps(spec.train.epochs, spec.train.max_steps)
    operations = model.operations_a_token() * tokens_of(examples, global_batch_size=batch, steps=steps)
    _check_offloading(model, spec)
    with _in_little_memory(model):
        _check_causal(model, spec)
        packed = _choose_packing(model, spec)
    compiled = _choose_compiling(model, spec, operations)
    recorded = _choose_recording(model, spec, packed=packed.taken)
    cached = _choose_caching(model, spec, examples, packed=packed.taken, repeated=steps * batch > len(examples))
    shared = _choose_sharing(model, spec, examples, packed=packed.taken, cached=cached.taken)
    return Execution(packed=packed, compiled=compiled, recorded=recorded, cached=cached, shared=shared)


def choose_reading(model: IntervenedModel, task: Task, record: Mapping[str, Any]) -> tuple[Layout, bool]:
    """(layout, whether heads are shared) of reading rows once more: as in the run of this run.json, if that is exact.

    What a record does not say, as that of a checkpoint without a run, is done where it is exact.
    """
    base = model.base_model
    packed = task.can_pack and record.get("layout", "packed") == "packed" and not is_offloaded(base)
    if not packed or why_not_packed(base) is not None:
        return "padded", False
    return "packed", bool(record.get("shared", True)) and why_not_shared(base) is None


@contextmanager
def _in_little_memory(model: IntervenedModel) -> Iterator[None]:
    """Inside, passes through a base whose weights are fetched let go of them block by block, as in training."""
    if not is_offloaded(model.base_model):
        yield
        return
    model.train()
    model.checkpoint_activations(True)
    try:
        yield
    finally:
        model.checkpoint_activations(False)
        model.eval()


def _check_offloading(model: IntervenedModel, spec: Spec) -> None:
    """ModelError: weights that are fetched for each pass would stay until its end, and so all be there at once."""
    if is_offloaded(model.base_model) and not spec.train.gradient_checkpointing:
        places = ", ".join(f"{count} blocks on {place}" for place, count in model.places.items())
        raise ModelError(
            f"model.device_map: the base is larger than the devices ({places}), and weights that are fetched for a "
            "block leave again before the pass is over only with train.gradient_checkpointing: true"
        )


def _check_causal(model: IntervenedModel, spec: Spec) -> None:
    """ModelError: a model that is to write reads the answers themselves while it learns them."""
    if spec.task.kind in WRITING and sees_ahead(model.base_model):
        raise ModelError(
            f"{spec.model.name}: its tokens see those after them, as an encoder's do, so it cannot learn to write; "
            "give a decoder, or write task.kind: classification or regression"
        )


def _choose_packing(model: IntervenedModel, spec: Spec) -> Choice:
    wanted, kind, task = spec.train.layout, spec.task.kind, task_of(spec.task.kind, beta=spec.task.beta)
    if wanted == "padded":
        return Choice(False)
    reason = why_not_packed(model.base_model) if task.can_pack else f"task.kind {kind} reads a row a sequence"
    if reason is not None and wanted == "packed":
        raise ModelError(f"train.layout: packed would not be exact: {reason}; write auto or padded")
    return Choice.unless(reason)


def _choose_compiling(model: IntervenedModel, spec: Spec, operations: float) -> Choice:
    wanted = spec.train.compile
    if wanted == "off":
        return Choice(False)
    reason = "the base is sharded" if spec.parallel.shard else SPREAD if model.places else None
    reason = reason or why_not_compiled(model.device)
    if reason is not None and wanted == "on":
        raise ModelError(f"train.compile: on is not possible: {reason}; write auto or off")
    if wanted == "on" or reason is not None:
        return Choice.unless(reason)
    if model.device.type != "cuda":
        return Choice(False, "it pays on a GPU only; train.compile: on does it here")
    if spec.model.quantization == "int8":
        return Choice(False, "an 8-bit base takes as long compiled")
    if operations < WORTH_COMPILING:
        return Choice(False, f"the run is too short to win back the time ({operations:.0e} operations)")
    return Choice(True)


def _choose_recording(model: IntervenedModel, spec: Spec, *, packed: bool) -> Choice:
    if spec.parallel.shard:
        return Choice(False, "parallel.shard gathers blocks as they are needed")
    if model.places:
        return Choice(False, SPREAD)
    if spec.train.cuda_graphs != "auto":
        return Choice(False)
    dropout = bool(model.bank.dropout) or spec.model.dropout
    checkpointing = spec.train.gradient_checkpointing
    return Choice.unless(why_not_recorded(model, packed=packed, checkpointing=checkpointing, dropout=dropout))


def _choose_caching(
    model: IntervenedModel, spec: Spec, examples: Sequence[Example], *, packed: bool, repeated: bool
) -> Choice:
    wanted = spec.train.cache_frozen
    if wanted == "off":
        return Choice(False)
    reason = SPREAD if model.places else None
    reason = reason or why_not_cached(
        model,
        tokens=len(Examples.of(examples).tokens),
        packed=packed,
        repeated=repeated,
        processes=size(),
        dropout=spec.model.dropout,
    )
    if reason is not None and wanted == "on":
        raise ModelError(f"train.cache_frozen: on is not possible: {reason}; write auto or off")
    if wanted == "auto" and reason is None and model.device.type != "cuda":
        reason = "a resumed run would not end in the same bits; train.cache_frozen: on does it here"
    return Choice.unless(reason)


def _choose_sharing(
    model: IntervenedModel, spec: Spec, examples: Sequence[Example], *, packed: bool, cached: bool
) -> Choice:
    if spec.train.share_head == "off":
        return Choice(False)
    if not packed:
        return Choice(False, "batches are padded")
    if cached:
        return Choice(False, "the frozen cache keeps whole rows")
    if model.bank.dropout or spec.model.dropout:
        return Choice(False, "dropout is drawn for every row by itself")
    if Examples.of(examples).rejected is not None:
        return Choice(False, "rows are pairs")
    rows = spec.train.micro_batch_size
    rows = spec.train.global_batch_size if rows == "auto" else rows
    if not typical_head(examples, groups=model.groups, rows=rows):
        return Choice(False, f"rows of a pass have no head of {LEAST} tokens or more in common")
    return Choice.unless(why_not_shared(model.base_model))
