"""Did you mean …? For unknown keys: names of other tools, the right section, a slip of the pen."""

from __future__ import annotations

import re
from difflib import get_close_matches

from reft_cli.spec.fields import keys_in, known_keys
from reft_cli.spec.quoting import KeyPath, dotted

# Names that pyreft, transformers, PEFT and others use, and the keys that mean the same. The one in the same section
# counts first.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    # sections
    "interventions": ("intervention",),
    "reft": ("intervention",),
    "reft_config": ("intervention",),
    "peft": ("intervention",),
    "dataset": ("data",),
    "datasets": ("data",),
    "training": ("train",),
    "trainer": ("train",),
    "eval": ("evaluation",),
    "validate": ("evaluation",),
    "generate": ("generation",),
    "sampling": ("generation",),
    "checkpoints": ("checkpoint",),
    "checkpointing": ("checkpoint",),
    # model
    "base_model": ("model",),
    "model_name": ("model.name",),
    "model_name_or_path": ("model.name",),
    "pretrained_model_name_or_path": ("model.name",),
    "torch_dtype": ("model.dtype",),
    "precision": ("model.dtype",),
    "bf16": ("model.dtype",),
    "fp16": ("model.dtype",),
    "attn_implementation": ("model.attention",),
    "flash_attention": ("model.attention",),
    "model_revision": ("model.revision",),
    # intervention
    "type": ("intervention.method", "task.kind", "data.format"),
    "intervention_type": ("intervention.method",),
    "reft_type": ("intervention.method",),
    "peft_type": ("intervention.method",),
    "layer": ("intervention.layers",),
    "position": ("intervention.positions",),
    "unit_locations": ("intervention.positions",),
    "low_rank_dimension": ("intervention.rank",),
    "low_rank_dim": ("intervention.rank",),
    "r": ("intervention.rank",),
    "lora_r": ("intervention.rank",),
    "share_weights": ("intervention.tied",),
    "shared_weights": ("intervention.tied",),
    "tied_weights": ("intervention.tied",),
    "tie_weights": ("intervention.tied",),
    "untied": ("intervention.tied",),
    "lora_dropout": ("intervention.dropout",),
    # task and data
    "task_type": ("task.kind",),
    "objective": ("task.kind",),
    "benchmark": ("task.suite",),
    "task_name": ("task.suite",),
    "preset": ("task.recipe",),
    "answer_pattern": ("task.extraction",),
    "regex": ("task.extraction",),
    "classes": ("task.labels",),
    "label_names": ("task.labels",),
    "path": ("data.train",),
    "file": ("data.train",),
    "train_file": ("data.train",),
    "train_path": ("data.train",),
    "train_dataset": ("data.train",),
    "training_data": ("data.train",),
    "val": ("data.validation",),
    "valid": ("data.validation",),
    "dev": ("data.validation",),
    "validation_file": ("data.validation",),
    "eval_file": ("data.validation",),
    "eval_dataset": ("data.validation",),
    "test_file": ("data.test",),
    "data_dir": ("data.folder",),
    "data_root": ("data.folder",),
    "num_fewshot": ("data.few_shot",),
    "fewshot": ("data.few_shot",),
    "shots": ("data.few_shot",),
    "max_seq_length": ("data.max_length",),
    "max_seq_len": ("data.max_length",),
    "model_max_length": ("data.max_length",),
    "cutoff_len": ("data.max_length",),
    "sequence_len": ("data.max_length",),
    "block_size": ("data.max_length",),
    "overflow": ("data.on_overflow",),
    "prompt_template": ("data.template",),
    "chat_template": ("data.template",),
    # train
    "lr": ("train.learning_rate",),
    "batch_size": ("train.global_batch_size",),
    "train_batch_size": ("train.global_batch_size",),
    "effective_batch_size": ("train.global_batch_size",),
    "gradient_accumulation_steps": ("train.global_batch_size",),
    "gradient_accumulation": ("train.global_batch_size",),
    "per_device_train_batch_size": ("train.micro_batch_size",),
    "num_train_epochs": ("train.epochs",),
    "num_epochs": ("train.epochs",),
    "steps": ("train.max_steps",),
    "num_steps": ("train.max_steps",),
    "iters": ("train.max_steps",),
    "lr_scheduler": ("train.schedule",),
    "lr_scheduler_type": ("train.schedule",),
    "scheduler": ("train.schedule",),
    "warmup": ("train.warmup_ratio",),
    "warmup_steps": ("train.warmup_ratio",),
    "grad_clip": ("train.max_grad_norm",),
    "gradient_clipping": ("train.max_grad_norm",),
    "clip_grad_norm": ("train.max_grad_norm",),
    "packing": ("train.layout",),
    "logging_steps": ("train.log_every",),
    # evaluation, generation
    "eval_steps": ("evaluation.every",),
    "eval_strategy": ("evaluation.every",),
    "evaluation_strategy": ("evaluation.every",),
    "per_device_eval_batch_size": ("generation.batch_size",),
    "eval_batch_size": ("generation.batch_size",),
    "max_tokens": ("generation.max_new_tokens",),
    "num_beams": ("generation.beams",),
    "stop_strings": ("generation.stop",),
    "stop_sequences": ("generation.stop",),
    # checkpoint, output
    "save_steps": ("checkpoint.every",),
    "save_every": ("checkpoint.every",),
    "save_total_limit": ("checkpoint.keep",),
    "metric_for_best_model": ("checkpoint.best",),
    "early_stopping": ("checkpoint.patience",),
    "early_stopping_patience": ("checkpoint.patience",),
    "output_dir": ("output",),
    "out_dir": ("output",),
    "run_name": ("name",),
    "report_to": ("log",),
    "logger": ("log",),
    "loggers": ("log",),
    "trackers": ("log",),
    "base": ("extends",),
    "defaults": ("extends",),
    "include": ("extends",),
}
SHOWN = 3


def nearest_keys(path: KeyPath) -> tuple[str, ...]:
    """Keys that an unknown key may have meant, the likeliest first, dotted; none if nothing is near."""
    *above, last = path
    name, section = _snake(str(last)), dotted(tuple(above))
    siblings = keys_in(tuple(above))
    candidates = (
        [_under(section, name)] if name in siblings else [],
        list(OTHER_NAMES.get(name, ())),
        [key for key in known_keys() if key.rpartition(".")[2] == name],
        [_under(section, near) for near in get_close_matches(name, siblings, 1, 0.7)],
        _near_elsewhere(name),
    )
    found = next(filter(None, candidates), [])
    here = [key for key in found if key.rpartition(".")[0] == section]
    return tuple(here or found[:SHOWN])


def _near_elsewhere(name: str) -> list[str]:
    near = get_close_matches(name, {key.rpartition(".")[2] for key in known_keys()}, 1, 0.75)
    return [key for key in known_keys() if near and key.rpartition(".")[2] == near[0]]


def _under(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _snake(name: str) -> str:
    """`learningRate` and `Learning-Rate` as `learning_rate`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-\s]+", "_", name).lower()
