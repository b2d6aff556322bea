"""From a spec or a manifest to models, evaluators and checkpoints: flat arguments for everything below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from reft_cli import __version__
from reft_cli.checkpoint import BaseIdentity, Checkpoint, InterventionIdentity
from reft_cli.data.batch import Layout
from reft_cli.data.fitting import check_fits
from reft_cli.errors import CheckpointError, Problem, SpecError
from reft_cli.evaluation.evaluate import Evaluator, References
from reft_cli.evaluation.extraction import Rule, rule_of
from reft_cli.evaluation.metrics import FROM_LOSS
from reft_cli.generation.settings import Decoding
from reft_cli.models.blocks import find_blocks, hidden_size
from reft_cli.models.build import build_intervened
from reft_cli.models.intervened import IntervenedModel
from reft_cli.models.loading import BaseModel, BaseSource, load_causal_lm, load_classifier
from reft_cli.positions import Positions
from reft_cli.runs.texts import TextSide, TrainingData
from reft_cli.spec.base import Conflict
from reft_cli.spec.quoting import printable
from reft_cli.spec.schema import GenerationSpec, ModelSpec, Spec
from reft_cli.spec.task import ExtractionSpec

SEEDS = 2**63  # torch takes no larger ones
FLAGS = ("max_new_tokens", "temperature", "top_p", "top_k", "batch_size", "compile", "seed")  # settings that have one
TOKEN_BUDGET = {"cuda": 16_384, "cpu": 4_096}  # tokens in one forward and backward pass


def base_source(model: ModelSpec) -> BaseSource:
    """Where a spec's base model comes from."""
    return BaseSource(**model.model_dump())


def load_base(source: BaseSource, text: TextSide, *, seed: int) -> BaseModel:
    """The base model with the head that the task needs."""
    if text.writes:
        return load_causal_lm(source)
    outputs = 1 if text.kind in ("regression", "reward") else len(text.labels or ())
    return load_classifier(source, outputs=outputs, pad_token_id=text.tokenizer.pad_token_id, seed=seed)


def build_from_spec(base: BaseModel, spec: Spec) -> IntervenedModel:
    """A fresh intervention, as the spec has it."""
    given = spec.intervention
    return build_intervened(
        base,
        method=given.method,
        layers=given.layers,
        component=given.component,
        positions=Positions.parse(given.positions),
        tied=given.tied,
        rank=given.rank,
        init=given.init,
        dropout=given.dropout,
        dropout_on=given.dropout_on,
        seed=spec.train.seed,
    )


def best_metric(spec: Spec) -> str:
    """The validation score that chooses the best checkpoint."""
    return spec.checkpoint.best or str(spec.task.metric)


def check_lengths(base: BaseModel, data: TrainingData, spec: Spec) -> None:
    """DataError if a row, or a validation prompt with its answer, has more tokens than the model has positions for."""
    generates = spec.task.kind == "causal_lm" and best_metric(spec) not in FROM_LOSS
    for encoded, generated in ((data.train, False), (data.validation, generates)):
        if encoded is not None:
            new = spec.generation.max_new_tokens if generated else 0
            check_fits(encoded.examples, base.model, name=f"{encoded.name}: row", new_tokens=new)


def build_from_checkpoint(base: BaseModel, checkpoint: Checkpoint) -> IntervenedModel:
    """The intervention of a checkpoint on its base. CheckpointError: the base is another one, or tensors do not fit."""
    manifest, found = checkpoint.manifest, describe_base(base)
    if found.shape_hash != manifest.base.shape_hash:
        raise CheckpointError(
            f"{checkpoint.path} was trained on {_named(manifest.base)}; {_other(found, manifest.base)}"
        )
    stored = manifest.intervention
    rows = {
        tensor.shape[-2] for name, tensor in checkpoint.tensors.items() if name.startswith("bank.") and tensor.ndim > 2
    }
    if rows - {stored.rank}:  # before memory is taken for a rank that no file holds
        raise CheckpointError(f"{checkpoint.path}: its tensors are not of rank {stored.rank}")
    model = build_intervened(
        base,
        method=stored.method,
        layers=stored.layers,
        component=stored.component,
        positions=Positions.parse(stored.positions),
        tied=stored.tied,
        rank=stored.rank,
        init="paper",
        dropout=0.0,
        dropout_on="delta",
        seed=0,
    )
    load_trainables(model, checkpoint)
    return model.eval()


def load_trainables(model: IntervenedModel, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's tensors into a model. CheckpointError: names or shapes differ; then nothing is changed."""
    wanted = {name: _form(tensor) for name, tensor in model.trainable_state().items()}
    given = {name: _form(tensor) for name, tensor in checkpoint.tensors.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise CheckpointError(
                f"{checkpoint.path}: tensor {printable(name)} is {given.get(name, 'missing')}, "
                f"this intervention has {wanted.get(name, 'none of that name')}"
            )
    bank = {name.removeprefix("bank."): t for name, t in checkpoint.tensors.items() if name.startswith("bank.")}
    model.bank.load_state_dict(bank)
    with torch.no_grad():
        for name, parameter in model.head_parameters().items():
            parameter.copy_(checkpoint.tensors[f"head.{name}"])


def _form(tensor: torch.Tensor) -> str:
    """Type and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def describe_base(base: BaseModel) -> BaseIdentity:
    """What a checkpoint keeps of its base model."""
    return BaseIdentity(
        name=base.name,
        commit=base.commit,
        dtype=base.dtype,  # type: ignore[arg-type]  # one of the spec's literals
        quantization=base.quantization,  # type: ignore[arg-type]
        shape_hash=base.shape_hash,
        layers=len(find_blocks(base.model).modules),
        hidden_size=hidden_size(base.model),
    )


def _named(base: BaseIdentity) -> str:
    commit = f"@{base.commit[:8]}" if base.commit else ""
    return f"{base.name}{commit} ({base.layers} layers, width {base.hidden_size})"


def _other(found: BaseIdentity, wanted: BaseIdentity) -> str:
    """Which base came instead; another name can only come from the flag."""
    came = f"--model gave {_named(found)}" if found.name != wanted.name else f"that name now gives {_named(found)}"
    alike = (found.layers, found.hidden_size) == (wanted.layers, wanted.hidden_size)
    return came + (", whose parameters have other names or shapes" if alike else "")


def manifest_fields(
    *, spec: Spec, base: BaseModel, model: IntervenedModel, text: TextSide, step: int
) -> dict[str, Any]:
    """A checkpoint's manifest, but for what is known only when its tensors are written."""
    given = spec.intervention
    return {
        "reft_version": __version__,
        "step": step,
        "base": describe_base(base),
        "intervention": InterventionIdentity(
            method=given.method,
            component=given.component,
            layers=sorted({site.layer for site in model.sites}),
            positions=given.positions,
            tied=given.tied,
            rank=given.rank,
            width=model.bank.width,
        ),
        "text": text.identity(str(spec.task.metric)),
        "generation": spec.generation.model_dump(),
    }


def decoding_of(generation: GenerationSpec, *, seed: int = 0) -> Decoding:
    """How answers are decoded."""
    values = generation.model_dump()
    values.pop("batch_size")
    return Decoding(**values | {"stop": tuple(generation.stop), "seed": seed})


def merge_generation(stored: Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[Decoding, int | None]:
    """(decoding, batch size) of a checkpoint, with what a command's flags say on top.

    SpecError: a flag has a value that cannot be, alone or beside what is stored.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    seed = given.pop("seed", 0)
    if type(seed) is not int or not 0 <= seed < SEEDS:
        raise SpecError(Problem(f"{printable(str(seed))} is not a whole number from 0 to {SEEDS - 1}", key="--seed"))
    try:
        generation = GenerationSpec.model_validate({**stored, **given})
    except ValidationError as error:
        found = {each["loc"][:1]: each for each in error.errors()}  # a key that may be a word or a number has two
        raise SpecError(*(_wrong_flag(each, given) for each in found.values())) from error
    for key in generation.idle:
        if key in given:
            raise SpecError(Problem("nothing is sampled at temperature 0; give --temperature too", key=_flag(key)))
    return decoding_of(generation, seed=seed), slots_of(generation)


def slots_of(generation: GenerationSpec) -> int | None:
    """Prompts decoded together; None: as many as are good for the device."""
    return None if generation.batch_size == "auto" else generation.batch_size


def _wrong_flag(error: ErrorDetails, given: Mapping[str, Any]) -> Problem:
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, Conflict):
        first = next(key for key in cause.keys if key in given)
        return Problem(f"{cause.keys[0]} {cause}", key=_flag(first))
    name, value = str(error["loc"][0]), printable(str(error["input"]))
    if error["type"] == "extra_forbidden":
        return Problem(f"no such setting; there are {', '.join(GenerationSpec.model_fields)}, seed", key=_flag(name))
    return Problem(str(cause) if cause else f"{error['msg'].lower()} (got {value})", key=_flag(name))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-") if name in FLAGS else f"generation.{printable(name)}"


def evaluator_of(
    text: TextSide,
    *,
    model: IntervenedModel,
    metric: str,
    decoding: Decoding,
    batch_size: int | None,
    tokens: int | None = None,
    layout: Layout = "padded",
    shared: bool = False,
    references: References | None = None,
) -> Evaluator:
    """How a split is scored: `tokens` of a pass, None: those of training on such a device, in a `layout`, with heads
    `shared` or not. `references` are kept from one time to the next.
    """
    return Evaluator(
        kind=text.kind,
        beta=text.beta,
        references=references,
        metric=metric,
        labels=list(text.labels) if text.labels else None,
        groups=model.groups,
        tokenizer=text.tokenizer,
        decoding=decoding,
        batch_size=batch_size,
        token_budget=tokens or token_budget(model.device),
        layout=layout,
        shared=shared,
        rule=_rule_of(text),
    )


def _rule_of(text: TextSide) -> Rule | None:
    given = text.extraction
    return rule_of(given.model_dump() if isinstance(given, ExtractionSpec) else given)


def token_budget(device: torch.device) -> int:
    """Tokens in one training pass on this kind of device."""
    return TOKEN_BUDGET.get(device.type, TOKEN_BUDGET["cpu"])
