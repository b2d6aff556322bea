"""How a run is carried out: packed, compiled, recorded, cached, with shared heads; or not, each with the reason why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
from reft_cli.positions import Positions
from reft_cli.runs.estimate import tokens_of
from reft_cli.spec.schema import Spec
from reft_cli.tasks.preferences import task_of
from reft_cli.training.frozen_cache import why_not_cached
from reft_cli.training.passes import why_not_recorded
from reft_cli.training.schedule import Order

# Floating-point operations of a run from which compiling wins back its time: on an H200 it takes 10 to 40 seconds and
# saves a third of a step of a model of 1B parameters (1.6e13 operations), a sixth at 8B (1.1e14).
WORTH_COMPILING = 5e16
SPREAD = "the base lies on several devices"


@dataclass(frozen=True)
class Execution:
    """What was chosen. A reason says why it is not the faster way; None if it is, or if the spec asked for this."""

    layout: Layout
    layout_reason: str | None
    compiled: bool
    compile_reason: str | None
    recorded: bool
    record_reason: str | None
    cached: bool
    cache_reason: str | None
    shared: bool
    share_reason: str | None


def choose_execution(model: IntervenedModel, spec: Spec, examples: Sequence[Example]) -> Execution:
    """The fastest exact way to train on these rows. ModelError: the spec insists on a way that is not open."""
    batch = spec.train.global_batch_size
    steps = Order(len(examples), batch, spec.train.seed).steps(spec.train.epochs, spec.train.max_steps)
    operations = model.operations_a_token() * tokens_of(examples, global_batch_size=batch, steps=steps)
    _check_offloading(model, spec)
    with _in_little_memory(model):
        _check_causal(model, spec)
        layout, layout_reason = _choose_layout(model, spec)
    compiled, compile_reason = _choose_compiling(model, spec, operations)
    recorded, record_reason = False, None
    if spec.parallel.shard:
        record_reason = "parallel.shard gathers blocks as they are needed"
    elif model.places:
        record_reason = SPREAD
    elif spec.train.cuda_graphs == "auto":
        record_reason = why_not_recorded(
            model,
            packed=layout == "packed",
            checkpointing=spec.train.gradient_checkpointing,
            dropout=bool(model.bank.dropout) or spec.model.dropout,
        )
        recorded = record_reason is None
    cached, cache_reason = _choose_caching(
        model, spec, examples, packed=layout == "packed", repeated=steps * batch > len(examples)
    )
    shared, share_reason = _choose_sharing(model, spec, examples, packed=layout == "packed", cached=cached)
    return Execution(
        layout,
        layout_reason,
        compiled,
        compile_reason,
        recorded,
        record_reason,
        cached,
        cache_reason,
        shared,
        share_reason,
    )


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


def _choose_layout(model: IntervenedModel, spec: Spec) -> tuple[Layout, str | None]:
    wanted, kind, task = spec.train.layout, spec.task.kind, task_of(spec.task.kind, beta=spec.task.beta)
    if wanted == "padded":
        return "padded", None
    reason = why_not_packed(model.base_model) if task.can_pack else f"task.kind {kind} reads a row a sequence"
    if reason is not None and wanted == "packed":
        raise ModelError(f"train.layout: packed would not be exact: {reason}; write auto or padded")
    return ("packed", None) if reason is None else ("padded", reason)


def _choose_compiling(model: IntervenedModel, spec: Spec, operations: float) -> tuple[bool, str | None]:
    wanted = spec.train.compile
    if wanted == "off":
        return False, None
    reason = "the base is sharded" if spec.parallel.shard else SPREAD if model.places else None
    reason = reason or why_not_compiled(model.device)
    if reason is not None and wanted == "on":
        raise ModelError(f"train.compile: on is not possible: {reason}; write auto or off")
    if wanted == "on" or reason is not None:
        return reason is None, reason
    if model.device.type != "cuda":
        return False, "it pays on a GPU only; train.compile: on does it here"
    if spec.model.quantization == "int8":
        return False, "an 8-bit base takes as long compiled"
    if operations < WORTH_COMPILING:
        return False, f"the run is too short to win back the time ({operations:.0e} operations)"
    return True, None


def _choose_caching(
    model: IntervenedModel, spec: Spec, examples: Sequence[Example], *, packed: bool, repeated: bool
) -> tuple[bool, str | None]:
    wanted = spec.train.cache_frozen
    if wanted == "off":
        return False, None
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
    return reason is None, reason


def _choose_sharing(
    model: IntervenedModel, spec: Spec, examples: Sequence[Example], *, packed: bool, cached: bool
) -> tuple[bool, str | None]:
    if spec.train.share_head == "off":
        return False, None
    if not packed:
        return False, "batches are padded"
    if cached:
        return False, "the frozen cache keeps whole rows"
    if model.bank.dropout or spec.model.dropout:
        return False, "dropout is drawn for every row by itself"
    if Examples.of(examples).rejected is not None:
        return False, "rows are pairs"
    groups = Positions.parse(spec.intervention.positions).groups(tied=spec.intervention.tied)
    rows = spec.train.micro_batch_size
    rows = spec.train.global_batch_size if rows == "auto" else rows
    if not typical_head(examples, groups=groups, rows=rows):
        return False, f"rows of a pass have no head of {LEAST} tokens or more in common"
    reason = why_not_shared(model.base_model)
    return reason is None, reason
