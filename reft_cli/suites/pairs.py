"""Preferences and rewards: pyreft's two examples on pairs of answers, true before false and better before worse.

DPO: Rafailov et al., 2023 (arXiv 2305.18290); TruthfulQA: Lin et al., 2022 (arXiv 2109.07958).
"""

from __future__ import annotations

from typing import Any

from reft_cli.suites.recipe import Recipe, Suite

DPO, REWARD = "pyreft's example dpo", "pyreft's example reward"
HUB = "the set's page on the hub"
DEFAULTS = "the defaults of transformers' trainer"
TRUTHFUL: dict[str, Any] = {
    "path": "truthfulqa/truthful_qa",
    "subset": "generation",
    "split": "validation",
    "local": "truthful_qa",
    "share": 0.8,
}
SYNTHETIC: dict[str, Any] = {
    "path": "Dahoas/synthetic-instruct-gptj-pairwise",
    "split": "train",
    "local": "synthetic-instruct-gptj-pairwise",
    "share": 0.95,
}
TRAINER: dict[str, Any] = {"train.warmup_ratio": 0.0, "train.schedule": "linear", "train.weight_decay": 0.0}
SUITES = (
    Suite(
        name="preference/truthfulqa",
        about="TruthfulQA's true answers before its false ones (DPO)",
        values={
            "task.kind": "preference",
            "task.metric": "accuracy",
            "task.beta": 0.1,
            "data.train": TRUTHFUL,
            "data.test": TRUTHFUL | {"rest": True},
            "data.format": "preference",
            "data.columns": {"prompt": "question", "chosen": "correct_answers", "rejected": "incorrect_answers"},
            "data.template": {"prompt": "[INST] {prompt} [/INST]", "completion": " {chosen}"},
            "data.max_length": 256,
            "data.on_overflow": "truncate_prompt",
        },
        sources={
            "task": DPO,
            "task.metric": "reft",
            "data": DPO,
            "data.train": "TruthfulQA",
            "data.test": "TruthfulQA",
        },
        recipes=(
            Recipe(
                "loreft",
                "example",
                "meta-llama/Llama-2-7b-chat-hf",
                {
                    "intervention.layers": [18, 28],
                    "intervention.positions": "f1+l1",
                    "intervention.rank": 4,
                    "intervention.tied": True,
                    "train.learning_rate": 1e-3,
                    "train.epochs": 3.0,
                    "train.global_batch_size": 10,
                }
                | TRAINER,
                DPO,
                ("layers 18 and 28 are for a model of 32; choose others for another depth.",),
            ),
        ),
        notes=(
            "of a question's right and wrong answers the first go together, the second, and so on, as in the example.",
            "which four fifths of the questions are learned follows from train.seed; the example divides them by "
            "another generator. Its prompts begin with two start tokens, here with one.",
            "no score was published.",
        ),
    ),
    Suite(
        name="reward/synthetic_instruct",
        about="a reward model from pairs of answers to instructions, better and worse",
        values={
            "task.kind": "reward",
            "task.metric": "accuracy",
            "data.train": SYNTHETIC,
            "data.test": SYNTHETIC | {"rest": True},
            "data.format": "preference",
            "data.template": "chat",
            "data.max_length": 512,
            "data.on_overflow": "truncate_answer",
        },
        sources={"task": REWARD, "data": REWARD, "data.train": HUB, "data.test": HUB},
        recipes=(
            Recipe(
                "loreft",
                "example",
                "google/gemma-2b-it",
                {
                    "intervention.layers": "all",
                    "intervention.positions": "f1+l1",
                    "intervention.rank": 1,
                    "intervention.tied": False,
                    "train.learning_rate": 5e-5,
                    "train.epochs": 1.0,
                    "train.global_batch_size": 256,
                }
                | TRAINER,
                f"{REWARD}, the learning rate and its schedule by {DEFAULTS}",
            ),
        ),
        notes=(
            "the example reads these pairs from llm-blender/Unified-Feedback and is scored on that set's validation "
            "rows; here a twentieth of the rows, drawn under train.seed, is held out. Published there: accuracy 0.676.",
            "the prompt is what the two answers are to; the example also counts the words that both begin with.",
        ),
    ),
)
