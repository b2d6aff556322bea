"""Checkpoints: a folder with `interventions.safetensors` and `reft.json`, and what training needs to go on.

    interventions.safetensors   bank.* (float32, stacked over sites) and head.*
    reft.json                   what they are: method, sites, positions, base model, template; a `Manifest`
    training.safetensors        optimizer moments and generator states, only for `--resume`
    training.json               where the run stood

A folder is written under a temporary name, synced and renamed, so there is never half a one. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reft_cli.errors import CheckpointError

FORMAT: Literal[1] = 1
TENSORS, MANIFEST = "interventions.safetensors", "reft.json"
TRAINING_TENSORS, TRAINING_STATE = "training.safetensors", "training.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BaseIdentity(_Part):
    """The base model that a checkpoint belongs to."""

    name: str
    commit: str | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    """As the spec had it."""
    shape_hash: str
    layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)


class InterventionIdentity(_Part):
    """What is edited, and how."""

    method: str
    component: str
    layers: list[int]
    positions: str
    tied: bool
    rank: int | None
    width: int = Field(ge=1)


class TextIdentity(_Part):
    """How text becomes tokens, so that inference does what training did."""

    kind: Literal["causal_lm", "classification", "regression"]
    metric: str
    format: dict[str, Any]
    template: dict[str, Any]
    labels: list[str] | None
    labels_given: bool
    append_eos: bool
    max_length: int = Field(ge=1)
    on_overflow: Literal["error", "drop", "truncate_prompt"]


class TensorIdentity(_Part):
    """Shape and type of a stored tensor."""

    shape: list[int]
    dtype: str


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
    sha256: str


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

    An older folder of that name is replaced. A crash at any moment leaves the old one or none.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, scratch / TENSORS)
    digest = hashlib.sha256((scratch / TENSORS).read_bytes()).hexdigest()
    whole = Manifest(**manifest, tensors=describe_tensors(stored), sha256=digest)
    (scratch / MANIFEST).write_text(whole.model_dump_json(indent=2) + "\n", encoding="utf-8")
    state_tensors, state = training
    save_file({name: tensor.cpu().contiguous() for name, tensor in state_tensors.items()}, scratch / TRAINING_TENSORS)
    (scratch / TRAINING_STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for file in scratch.iterdir():
        _sync(file)
    _sync(scratch)
    if path.exists():
        shutil.rmtree(path)
    scratch.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint folder.

    CheckpointError: a file is missing, damaged, or not what the manifest says.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    manifest = _read_manifest(path / MANIFEST)
    file = path / TENSORS
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file}: {(error.strerror or 'cannot be read').lower()}") from error
    if digest != manifest.sha256:
        raise CheckpointError(f"{file}: damaged: its contents are not those that {MANIFEST} was written for")
    tensors = _read_tensors(file)
    if describe_tensors(tensors) != manifest.tensors:
        raise CheckpointError(f"{file}: its tensors are not those that {MANIFEST} lists")
    return Checkpoint(path, manifest, tensors)


def read_training_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `--resume` needs. CheckpointError: the checkpoint holds none, or a damaged one."""
    try:
        state = json.loads((path / TRAINING_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / TRAINING_STATE}: cannot be read, so training cannot go on from here") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / TRAINING_STATE}: not a training state")
    return _read_tensors(path / TRAINING_TENSORS), state


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file}: damaged: {str(error).splitlines()[0]}") from error


def _read_manifest(file: Path) -> Manifest:
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{file}: {(error.strerror or 'cannot be read').lower()}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged: not JSON") from error
    if isinstance(found, dict) and isinstance(found.get("format"), int) and found["format"] > FORMAT:
        raise CheckpointError(f"{file}: format {found['format']}; this version reads up to {FORMAT}: update reft")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise CheckpointError(f"{file}: damaged: {key}: {first['msg']}") from error
