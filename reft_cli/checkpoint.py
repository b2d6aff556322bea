"""Checkpoints: a folder with `interventions.safetensors` and `reft.json`, and what training needs to go on.

    interventions.safetensors   bank.* (float32, stacked over sites) and head.*
    reft.json                   what they are: method, sites, positions, base model, template; a `Manifest`
    training.safetensors        optimizer moments and generator states, only for `--resume`
    training.json               where the run stood

The first two are a whole checkpoint. Digests seal each pair, and the second to the first, so that damage and mixtures
are seen; a folder is written under a temporary name, synced and renamed, so that there is never half a one. Nothing is
unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from reft_cli.errors import CheckpointError
from reft_cli.kinds import Overflow, TaskKind
from reft_cli.layers import parse_layers
from reft_cli.positions import Positions
from reft_cli.reading import read_bytes, read_json
from reft_cli.spec.quoting import printable
from reft_cli.spec.schema import GenerationSpec, Method
from reft_cli.spec.task import ExtractionSpec, RuleName
from reft_cli.writing import json_text, sync_folder, write_synced

FORMAT: Literal[1] = 1
TENSORS, MANIFEST = "interventions.safetensors", "reft.json"
TRAINING_TENSORS, TRAINING_STATE = "training.safetensors", "training.json"
STEP_NAME = re.compile(r"step_(\d{6,})")  # the name of a folder that a run keeps


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BaseIdentity(_Part):
    """The base model that a checkpoint belongs to."""

    name: str
    commit: str | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    """As the spec had it."""
    quantization: Literal["float8", "nf4", "int8"] | None = None
    shape_hash: str
    layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)


class InterventionIdentity(_Part):
    """What is edited, and how."""

    method: Method
    component: str
    layers: list[int]
    positions: str
    tied: bool
    rank: int | None = Field(ge=1)
    width: int = Field(ge=1)

    @field_validator("layers")
    @classmethod
    def _layers(cls, layers: list[int]) -> list[int]:
        parse_layers(layers)
        return layers

    @field_validator("component")
    @classmethod
    def _component(cls, name: str) -> str:
        if not re.fullmatch(r"[\w.]{1,200}", name):
            raise ValueError("not a component")
        return name

    @field_validator("positions")
    @classmethod
    def _positions(cls, text: str) -> str:
        return str(Positions.parse(text))

    @model_validator(mode="after")
    def _rank(self) -> InterventionIdentity:
        if (self.rank is None) != (self.method == "red"):
            raise ValueError(f"{self.method} with rank {self.rank}")
        return self


class TextIdentity(_Part):
    """How text becomes tokens, so that inference does what training did."""

    kind: TaskKind
    metric: str
    format: dict[str, Any]
    template: dict[str, Any]
    labels: list[str] | None
    labels_given: bool
    append_eos: bool
    max_length: int = Field(ge=1)
    on_overflow: Overflow
    extraction: RuleName | ExtractionSpec | None = None
    """As the spec had it."""
    beta: float | None = Field(default=None, gt=0)
    """Of a preference task, else None."""

    @model_validator(mode="after")
    def _labels(self) -> TextIdentity:
        if (self.kind == "classification") != bool(self.labels):
            raise ValueError(f"{self.kind} with labels {self.labels}")
        if (self.kind == "preference") != (self.beta is not None):
            raise ValueError(f"{self.kind} with beta {self.beta}")
        return self


class TensorIdentity(_Part):
    """Shape and type of a stored tensor."""

    shape: list[int]
    dtype: str


class Digests(_Part):
    """SHA-256 that a checkpoint is checked by."""

    tensors: str
    """Of interventions.safetensors."""
    manifest: str
    """Of every other key of reft.json, `tensors` included."""


class Manifest(_Part):
    """The contents of reft.json."""

    format: Literal[1] = FORMAT
    reft_version: str
    step: int = Field(ge=0)
    base: BaseIdentity
    intervention: InterventionIdentity
    text: TextIdentity
    generation: dict[str, Any]
    tensors: dict[str, TensorIdentity]
    sha256: Digests

    @field_validator("generation")
    @classmethod
    def _generation(cls, values: dict[str, Any]) -> dict[str, Any]:
        GenerationSpec.model_validate(values)
        return values


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from disk and checked against its own manifest."""

    path: Path
    manifest: Manifest
    tensors: dict[str, Tensor]


def describe_tensors(tensors: dict[str, Tensor]) -> dict[str, TensorIdentity]:
    """Shapes and types, as the manifest holds them."""
    return {
        name: TensorIdentity(shape=list(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
        for name, tensor in sorted(tensors.items())
    }


def write_checkpoint(
    path: Path,
    *,
    tensors: dict[str, Tensor],
    manifest: dict[str, Any],
    training: tuple[dict[str, Tensor], dict[str, Any]],
) -> None:
    """Write a checkpoint folder; `manifest` is a Manifest's fields without tensors and sha256.

    An older folder of that name is replaced. A crash at any moment leaves the old one or none. OSError: the disk is
    full, say; then the old one is as it was, and nothing else is left.
    """
    new, old = (path.with_name(f".{path.name}.{os.getpid()}.{use}.tmp") for use in ("new", "old"))
    _remove(new, old)  # a killed process may have had our number
    try:
        new.mkdir(parents=True)
        for name, data in _files(tensors, manifest, training).items():
            write_synced(new / name, data)
        sync_folder(new)
        _replace(path, new, old)
        sync_folder(path.parent)
    finally:
        _remove(new, old)


def _replace(path: Path, new: Path, old: Path) -> None:
    """Put `new` at `path`, and what was there at `old`."""
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _files(
    tensors: dict[str, Tensor], manifest: dict[str, Any], training: tuple[dict[str, Tensor], dict[str, Any]]
) -> dict[str, bytes]:
    """Names and contents."""
    stored = _on_host(tensors)
    data = save(stored)
    unsealed = Manifest(
        **manifest, tensors=describe_tensors(stored), sha256=Digests(tensors=_digest(data), manifest="")
    )
    fields = json.loads(unsealed.model_dump_json())
    fields["sha256"]["manifest"] = _manifest_digest(fields)
    moments, progress = save(_on_host(training[0])), training[1]
    state = {"progress": progress, "sha256": _training_digest(progress, moments, Manifest(**fields))}
    return {
        TENSORS: data,
        MANIFEST: json_text(fields).encode(),
        TRAINING_TENSORS: moments,
        TRAINING_STATE: (json.dumps(state, indent=2) + "\n").encode(),
    }


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _manifest_digest(fields: dict[str, Any]) -> str:
    """Of every key but itself, as JSON; spaces and the order of keys do not matter."""
    return _digest(json.dumps(fields | {"sha256": fields["sha256"]["tensors"]}, sort_keys=True).encode())


def _training_digest(progress: object, moments: bytes, manifest: Manifest) -> str:
    """Ties a training state to the weights that it was written with."""
    return _digest(manifest.sha256.manifest.encode(), json.dumps(progress, sort_keys=True).encode(), moments)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint folder.

    CheckpointError: a file is missing, damaged, or not what the manifest says.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    manifest = _read_manifest(path / MANIFEST)
    file = path / TENSORS
    data = read_bytes(file)
    if _digest(data) != manifest.sha256.tensors:
        raise CheckpointError(f"{file}: damaged: its contents are not those that {MANIFEST} was written for")
    tensors = _tensors(data, file)
    if describe_tensors(tensors) != manifest.tensors:
        raise CheckpointError(f"{file}: damaged: its tensors are not those that {MANIFEST} lists")
    named = STEP_NAME.fullmatch(path.name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(f"{path}: was step {manifest.step} when it was written, and has another one's name")
    return Checkpoint(path, manifest, tensors)


def read_training_state(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `--resume` needs. CheckpointError: the checkpoint holds none, a damaged one, or that of another."""
    state_file, file = checkpoint.path / TRAINING_STATE, checkpoint.path / TRAINING_TENSORS
    for needed in (state_file, file):
        if not needed.exists():
            raise CheckpointError(f"{checkpoint.path}: has no {needed.name}, so training cannot go on from it")
    state, moments = read_json(state_file), read_bytes(file)
    if not isinstance(state, dict) or not isinstance(progress := state.get("progress"), dict):
        raise CheckpointError(f"{state_file}: damaged: not a training state")
    if state.get("sha256") != _training_digest(progress, moments, checkpoint.manifest):
        raise CheckpointError(
            f"{checkpoint.path}: {TRAINING_STATE} or {TRAINING_TENSORS} is damaged, or not of this checkpoint, "
            "so training cannot go on from it"
        )
    return _tensors(moments, file), progress


def _tensors(data: bytes, file: Path) -> dict[str, Tensor]:
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: damaged: {printable(str(error), limit=200)}") from error


def _read_manifest(file: Path) -> Manifest:
    found = read_json(file)
    written = found.get("format") if isinstance(found, dict) else None
    if isinstance(written, int) and written > FORMAT:
        raise CheckpointError(f"{file}: format {written}; this version reads up to {FORMAT}: update reft")
    try:
        manifest = Manifest.model_validate(found)
        sealed = _manifest_digest(found) == manifest.sha256.manifest
    except ValidationError as error:
        first = error.errors()[0]
        key = printable(".".join(map(str, first["loc"]))) or "the file"
        raise CheckpointError(f"{file}: damaged: {key}: {printable(first['msg'], limit=200)}") from error
    except RecursionError as error:
        raise CheckpointError(f"{file}: damaged: nested too deeply") from error
    if not sealed:
        raise CheckpointError(f"{file}: damaged: its contents are not those that were written")
    return manifest
