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
    "eval": ("evaluation", "data.validation"),
    "validate": ("evaluation",),
    "generate": ("generation",),
    "sampling": ("generation",),
    "checkpoints": ("checkpoint",),
    "checkpointing": ("checkpoint",),
    # model
    "base_model": ("model",),
    "model_name": ("model.name",),
    "model_name_or_path": ("model.name",),
    "name_or_path": ("model.name",),
    "pretrained_model_name_or_path": ("model.name",),
    "load_in_4bit": ("model.quantization",),
    "load_in_8bit": ("model.quantization",),
    "quantization_bit": ("model.quantization",),
    "bits": ("model.quantization",),
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
    "adapter": ("intervention.method",),
    "finetuning_type": ("intervention.method",),
    "train_type": ("intervention.method",),
    "tuner_type": ("intervention.method",),
    "layers_to_transform": ("intervention.layers",),
    "target_modules": ("intervention.component",),
    "lora_target_modules": ("intervention.component",),
    "lora_target": ("intervention.component",),
    "layer": ("intervention.layers",),
    "position": ("intervention.positions",),
    "unit_locations": ("intervention.positions",),
    "low_rank_dimension": ("intervention.rank",),
    "low_rank_dim": ("intervention.rank",),
    "r": ("intervention.rank",),
    "low_rank": ("intervention.rank",),
    "lora_r": ("intervention.rank",),
    "lora_rank": ("intervention.rank",),
    "share_weights": ("intervention.tied",),
    "shared_weights": ("intervention.tied",),
    "tied_weights": ("intervention.tied",),
    "tie_weights": ("intervention.tied",),
    "untied": ("intervention.tied",),
    "lora_dropout": ("intervention.dropout",),
    # task and data
    "task_type": ("task.kind",),
    "objective": ("task.kind",),
    "stage": ("task.kind",),
    "rlhf_type": ("task.kind",),
    "dpo_beta": ("task.beta",),
    "pref_beta": ("task.beta",),
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
    "val_size": ("data.validation",),
    "val_set_size": ("data.validation",),
    "val_dataset": ("data.validation",),
    "split_dataset_ratio": ("data.validation",),
    "max_samples": ("data.train.limit",),
    "max_n_train_example": ("data.train.limit",),
    "dataset_dir": ("data.folder",),
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
    "max_length": ("data.max_length", "generation.max_new_tokens"),
    "model_max_length": ("data.max_length",),
    "cutoff_len": ("data.max_length",),
    "sequence_len": ("data.max_length",),
    "block_size": ("data.max_length",),
    "overflow": ("data.on_overflow",),
    "prompt_template": ("data.template",),
    "chat_template": ("data.template",),
    # train
    "lr": ("train.learning_rate",),
    "batch_size": ("train.global_batch_size", "generation.batch_size"),
    "train_batch_size": ("train.global_batch_size",),
    "effective_batch_size": ("train.global_batch_size",),
    "gradient_accumulation_steps": ("train.global_batch_size",),
    "gradient_accumulation": ("train.global_batch_size",),
    "per_device_train_batch_size": ("train.micro_batch_size",),
    "num_train_epochs": ("train.epochs",),
    "num_epochs": ("train.epochs",),
    "steps": ("train.max_steps", "evaluation.every", "checkpoint.every"),
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
    "sample_packing": ("train.layout",),
    "logging_steps": ("train.log_every",),
    "deepspeed": ("parallel.shard",),
    "fsdp": ("parallel.shard",),
    "num_processes": ("parallel.processes",),
    "nproc_per_node": ("parallel.processes",),
    # evaluation, generation
    "eval_steps": ("evaluation.every",),
    "eval_strategy": ("evaluation.every",),
    "evaluation_strategy": ("evaluation.every",),
    "strategy": ("evaluation.every", "checkpoint.every"),
    "evals_per_epoch": ("evaluation.every",),
    "per_device_eval_batch_size": ("generation.batch_size",),
    "eval_batch_size": ("generation.batch_size",),
    "max_tokens": ("generation.max_new_tokens",),
    "num_beams": ("generation.beams",),
    "do_sample": ("generation.temperature",),
    "greedy_decoding": ("generation.temperature",),
    "stop_strings": ("generation.stop",),
    "stop_sequences": ("generation.stop",),
    # checkpoint, output
    "save_steps": ("checkpoint.every",),
    "save_every": ("checkpoint.every",),
    "save_strategy": ("checkpoint.every",),
    "saves_per_epoch": ("checkpoint.every",),
    "save_total_limit": ("checkpoint.keep",),
    "metric_for_best_model": ("checkpoint.best",),
    "early_stopping": ("checkpoint.patience",),
    "early_stopping_patience": ("checkpoint.patience",),
    "output_dir": ("output",),
    "out_dir": ("output",),
    "run_name": ("name",),
    "report_to": ("log",),
    "wandb": ("log",),
    "use_wandb": ("log",),
    "wandb_project": ("log",),
    "logger": ("log",),
    "loggers": ("log",),
    "trackers": ("log",),
    "base": ("extends",),
    "defaults": ("extends",),
    "include": ("extends",),
}
REMARKS = {  # on a key of ours that does not mean quite the same
    "warmup_steps": "a share of the steps",
    "gradient_accumulation_steps": "the rows of a step; accumulation follows from it",
    "gradient_accumulation": "the rows of a step; accumulation follows from it",
    "evals_per_epoch": "epoch, or a number of steps",
    "saves_per_epoch": "epoch, or a number of steps",
    "do_sample": "above 0: sampling",
    "greedy_decoding": "0: greedy",
}
ADAM = "there is one optimizer, AdamW, and train.learning_rate and train.weight_decay set it"
WITHOUT_OURS = {  # what others have and nothing here means
    "optimizer": ADAM,
    "optim": ADAM,
    "adam_beta1": ADAM,
    "adam_beta2": ADAM,
    "adam_epsilon": ADAM,
    "lora_alpha": "an edit is not scaled; train.learning_rate does what it is for",
    "alpha": "an edit is not scaled; train.learning_rate does what it is for",
    "embed_dim": "the model's width is known; remove it",
    "act_fn": "edits are linear; remove it",
    "shuffle": "rows are shuffled in every epoch, under train.seed",
    "num_workers": "a thread builds batches ahead; remove it",
    "dataloader_num_workers": "a thread builds batches ahead; remove it",
    "preprocessing_num_workers": "tokens are kept in a cache; remove it",
    "train_on_inputs": "the prompt is never learned; remove it",
    "pad_to_sequence_len": "batches are as long as their longest row; remove it",
    "group_by_length": "rows are packed by their lengths; remove it",
    "resume_from_checkpoint": "a flag does it: reft train SPEC --resume",
    "overwrite_output_dir": "a flag does it: reft train SPEC --overwrite",
    "do_train": "the command says it: reft train, reft eval",
    "do_eval": "the command says it: reft train, reft eval",
}
SHOWN = 3


def nearest_keys(path: KeyPath) -> tuple[str, ...]:
    """Keys that an unknown key may have meant, the likeliest first, dotted; none if nothing is near."""
    *above, last = path
    name, section = _snake(str(last)), dotted(tuple(above))
    if name in WITHOUT_OURS:
        return ()
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


def remark_on(path: KeyPath) -> str | None:
    """What to know of an unknown key besides the nearest ones, or in their place."""
    name = _snake(str(path[-1]))
    return REMARKS.get(name) or WITHOUT_OURS.get(name)


def _near_elsewhere(name: str) -> list[str]:
    near = get_close_matches(name, {key.rpartition(".")[2] for key in known_keys()}, 1, 0.75)
    return [key for key in known_keys() if near and key.rpartition(".")[2] == near[0]]


def _under(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _snake(name: str) -> str:
    """`learningRate` and `Learning-Rate` as `learning_rate`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-\s]+", "_", name).lower()
