"""Loads the frozen base model and its tokenizer from the hub, a local folder or the package.

It knows no interventions. Every problem of the hub, of a folder or of a name is a ModelError with one line.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from reft_cli import bundled
from reft_cli.errors import ModelError, first_line
from reft_cli.models.blocks import ENCODER_DECODER
from reft_cli.models.float8 import to_float8, why_no_float8
from reft_cli.models.low_bit import KINDS, hold_no_inputs, quantization_config, true_shape
from reft_cli.models.placement import is_spread, spreading
from reft_cli.models.sharding import shard_blocks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
POOLER = ".pooler."  # in the names of BERT's weights that only a head for whole texts reads
HEAD_STREAM = 1_000_003  # added to the seed for a head's start: the bank draws from the seed itself
FAILURES = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class BaseSource:
    """Which base model, and how it is to be loaded."""

    name: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    quantization: str | None = None
    attention: str = "auto"
    dropout: bool = False
    trust_remote_code: bool = False
    shard: bool = False
    """Spread the blocks over the run's processes."""
    device_map: str | None = None
    """auto: lay the model out over the machine's devices."""
    max_memory: Mapping[str, str] | None = None
    """The most that weights take of each device, for `device_map`."""

    @property
    def location(self) -> str:
        """Hub id or local path; `bundled:NAME` resolved to its folder in the package."""
        return str(bundled.locate(self.name, kind="model")) if bundled.is_bundled(self.name) else self.name


@dataclass(frozen=True)
class BaseModel:
    """A loaded base: frozen, in eval mode, on its device. The commit is None for local folders."""

    model: PreTrainedModel
    name: str
    commit: str | None
    shape_hash: str
    dtype: str = "auto"
    """As it was asked for."""
    quantization: str | None = None


def pick_device(wanted: str) -> torch.device:
    """The device that a spec's `device` means here. ModelError: this machine has none such."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", wanted):
        raise ModelError(f"model.device: `{wanted}` is not auto, cpu, mps, cuda or cuda:N")
    device = torch.device(wanted)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ModelError(f"model.device: {wanted} does not exist; this machine has {count or 'no'} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("model.device: mps is not available on this machine; write auto or cpu")
    return device


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The type of the base's weights: auto is bfloat16 on GPUs that compute in it, else float32."""
    if wanted != "auto":
        return DTYPES[wanted]
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


def load_config(source: BaseSource) -> PretrainedConfig:
    """The model's configuration, without its weights."""
    _check_folder(source)
    try:
        return AutoConfig.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except FAILURES as error:
        raise ModelError(_explain(source, error)) from error


def load_tokenizer(source: BaseSource) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer; a missing padding token becomes the end-of-sequence token."""
    _check_folder(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except FAILURES as error:
        raise ModelError(_explain(source, error)) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{source.name}: needs a fast tokenizer (tokenizer.json); this one is {type(tokenizer).__name__}"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_causal_lm(source: BaseSource) -> BaseModel:
    """A frozen decoder with its language-modelling head. ModelError: its files lack weights, such as the head's."""
    loaded, missing = _load(source, AutoModelForCausalLM, {})
    if missing:
        raise ModelError(
            f"{source.name}: its files lack {_shown(missing)}, and without trained ones it cannot write; give a model "
            "with a language-modelling head, or write task.kind: classification"
        )
    return loaded


def load_classifier(source: BaseSource, *, outputs: int, pad_token_id: int | None, seed: int) -> BaseModel:
    """A frozen transformer with a head of `outputs` numbers that trains, in float32; its weights follow `seed`.

    A pooler that the files lack, as those of models for masked words do, is part of the head. ModelError: they lack
    other weights of the transformer.
    """
    torch.manual_seed(seed + HEAD_STREAM)
    overrides = {"num_labels": outputs, "pad_token_id": pad_token_id}
    loaded, missing = _load(source, AutoModelForSequenceClassification, overrides)
    model, transformer = loaded.model, loaded.model.base_model_prefix
    lacking = [name for name in missing if name.startswith(f"{transformer}.")]
    if not all(POOLER in name for name in lacking) or (lacking and source.quantization in KINDS):
        raise ModelError(f"{source.name}: its files lack {_shown(lacking)}, which are not trained here")
    poolers = {name[: name.index(POOLER) + len(POOLER) - 1] for name in lacking}
    for head in (*(child for name, child in model.named_children() if name != transformer), *_modules(model, poolers)):
        for parameter in head.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        head.register_forward_pre_hook(_float_input)
    return loaded


def _modules(model: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    return [model.get_submodule(path) for path in sorted(paths)]


def _shown(names: Sequence[str]) -> str:
    """One of the names, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _float_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.float() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args)


def _load(source: BaseSource, auto: type, overrides: dict[str, Any]) -> tuple[BaseModel, list[str]]:
    """The model, and the names of parameters that its files lack, which are random."""
    config = load_config(source)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{source.name} is an {ENCODER_DECODER}")
    for key, value in overrides.items():
        setattr(config, key, value)
    if not source.dropout:
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
    device = pick_device(source.device)
    reason = why_no_float8(device) if source.quantization == "float8" else None
    if reason is not None:
        raise ModelError(f"model.quantization: {reason}; remove it, or train elsewhere")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers warns of weights that the head brings anew
            model, info = auto.from_pretrained(  # type: ignore[attr-defined]  # every Auto class has it
                source.location,
                config=config,
                revision=source.revision,
                dtype=pick_dtype(source.dtype, device),
                attn_implementation=None if source.attention == "auto" else source.attention,
                trust_remote_code=source.trust_remote_code,
                output_loading_info=True,
                **_placement(source, auto, config, device),
            )
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise ModelError(_explain(source, error)) from error
    missing = sorted({name for name, _ in model.named_parameters()} & {*info["missing_keys"]})
    model.requires_grad_(False)
    model.eval()
    if source.shard:
        shard_blocks(model, device)
    if source.quantization == "int8":
        hold_no_inputs(model)
    if source.quantization == "float8":
        to_float8(model, device)
    if source.quantization not in KINDS and not is_spread(model):
        model.to(device)
    commit = getattr(config, "_commit_hash", None)
    return BaseModel(model, source.name, commit, shape_hash(model), source.dtype, source.quantization), missing


def _placement(source: BaseSource, auto: type, config: PretrainedConfig, device: torch.device) -> dict[str, Any]:
    """Weights go straight from the file to the device, quantised on the way by bitsandbytes.

    To shard them or turn them into float8, they stay in the file, which is mapped into memory, until it is their turn.
    So they do with a head, whose first weights are drawn on the CPU, the same for every device.
    """
    if source.device_map is not None:
        return spreading(device, source.max_memory)
    if source.quantization in KINDS:
        dtype = pick_dtype(source.dtype, device)
        quantised = quantization_config(source.quantization, auto=auto, config=config, dtype=dtype)
        return {"quantization_config": quantised, "device_map": {"": device}}
    waiting = source.shard or source.quantization == "float8" or auto is not AutoModelForCausalLM
    straight = device.type == "cuda" and not waiting
    return {"device_map": {"": device}} if straight else {}


def shape_hash(model: PreTrainedModel) -> str:
    """Names and shapes of the transformer's parameters, without the head: equal only for models that fit each other."""
    lines = sorted(f"{name} {list(true_shape(p))}" for name, p in model.base_model.named_parameters())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _check_folder(source: BaseSource) -> None:
    path = Path(source.location)
    looks_local = path.is_absolute() or source.name.startswith((".", "~")) or source.name.count("/") > 1
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{source.name}: this folder has no config.json, so it is not a Hugging Face model")
    elif path.is_file():
        raise ModelError(f"{source.name}: this is a file; a model is a folder with config.json, or a hub id")
    elif looks_local:
        there = [str(entry) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), there, 1, 0.6)
        raise ModelError(f"{source.name}: no such folder" + (f"; did you mean `{near[0]}`?" if near else ""))


def _explain(source: BaseSource, error: Exception) -> str:
    """One line from what transformers and the hub client say in many."""
    text = str(error)
    name = source.name + (f"@{source.revision}" if source.revision else "")
    if "trust_remote_code" in text:
        return f"{name}: this repository brings Python code; read it, then set model.trust_remote_code: true"
    if "gated" in text or "401" in text or "403" in text:
        return f"{name}: access is refused; accept its terms on the hub and log in (`hf auth login`)"
    if isinstance(error, ImportError):
        return f"{name}: {first_line(error)}"
    if "Unrecognized configuration class" in text:
        if "SequenceClassification" in text:
            return (
                f"{name}: transformers has no head for whole texts of this kind; task.kind: causal_lm writes the answer"
            )
        return f"{name}: this architecture does not write; for an encoder write task.kind: classification or regression"
    if "onnect" in text or "offline" in text.lower() or "cached files" in text:
        return f"{name}: not in the local cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set)"
    if "not a valid model identifier" in text or "404" in text or "Repository Not Found" in text:
        return f"{name}: neither a local folder nor a model on the hub"
    return f"{name}: cannot be loaded: {first_line(error)}"
