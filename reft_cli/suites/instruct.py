"""Instruction following: UltraFeedback's preferred answers in Alpaca's template; the answers are judged elsewhere.

Wu et al., 2024 (arXiv 2404.03592); RED: Wu et al., 2024 (arXiv 2402.15179).
"""

from __future__ import annotations

from typing import Any

from reft_cli.suites.commonsense import CODE, PAPER, README
from reft_cli.suites.recipe import Recipe, Suite

MODEL = "meta-llama/Llama-2-7b-hf"
LOREFT: dict[str, Any] = {
    "intervention.layers": [3, 9, 18, 24],
    "intervention.positions": "f5+l5",
    "intervention.rank": 4,
    "intervention.tied": False,
    "intervention.dropout": 0.0,
    "train.learning_rate": 9e-4,
    "train.warmup_ratio": 0.0,
    "train.schedule": "linear",
    "train.weight_decay": 0.0,
    "train.epochs": 9.0,
    "train.global_batch_size": 128,
}
RED: dict[str, Any] = {
    "intervention.layers": "all",
    "intervention.component": "mlp_output",
    "intervention.positions": "all",
    "data.template": {"prompt": "Human: {instruction}\n\nAssistant: ", "completion": "{output}"},
    "data.max_length": 512,
    "generation.max_new_tokens": 768,
    "train.learning_rate": 2e-5,
    "train.schedule": "cosine",
    "train.warmup_ratio": 0.1,
    "train.weight_decay": 0.0,
    "train.epochs": 3.0,
    "train.global_batch_size": 128,
}
RED_NOTES = (
    "RED trained on HuggingFaceH4/ultrafeedback_binarized (train_sft, prompts of at most 256 tokens and texts of at "
    "most 512), another cleaning of the same data, and learned the prompt too; here only the answer is learned.",
    "RED wrote a space before the end token; here the end token follows the answer.",
)
THOUSAND = {
    "data.train": {
        "path": "https://raw.githubusercontent.com/frankaging/ultrafeedback-dataset/main/train.json",
        "local": "ultrafeedback",
        "split": "train",
        "share": 1000,
    }
}
LAYERS_NOTE = "layers 3, 9, 18 and 24 are for a model of 32; choose others for another depth."
SUITES = (
    Suite(
        name="instruct",
        about="UltraFeedback's answers; prompts of AlpacaEval to be answered and judged",
        values={
            "task.kind": "causal_lm",
            "task.metric": "loss",
            "data.train": {key: value for key, value in THOUSAND["data.train"].items() if key != "share"},
            "data.test": {
                "path": "https://huggingface.co/datasets/tatsu-lab/alpaca_eval/resolve/main/alpaca_eval.json",
                "local": "alpaca_eval",
                "split": "test",
            },
            "data.format": "alpaca",
            "data.template": "alpaca",
            "data.max_length": 768,
            "data.on_overflow": "truncate_answer",
            "generation.max_new_tokens": 2048,
            "generation.no_repeat_ngram_size": 5,
            "generation.repetition_penalty": 1.1,
        },
        sources={
            "task.metric": "reft: a stand-in for the judge",
            "task": CODE,
            "data.train": "frankaging/ultrafeedback-dataset",
            "data.test": "AlpacaEval 1.0",
            "data": f"{CODE} and {README}",
            "generation": f"{CODE}, after RED; there 2048 counts the prompt too",
        },
        recipes=(
            Recipe("loreft", "paper", MODEL, LOREFT, README, (LAYERS_NOTE,)),
            Recipe(
                "loreft", "half", MODEL, LOREFT | {"intervention.rank": 2}, f"{PAPER}, half the rank", (LAYERS_NOTE,)
            ),
            Recipe(
                "loreft",
                "1k",
                MODEL,
                LOREFT | THOUSAND,
                f"{PAPER}, a thousand rows",
                (
                    LAYERS_NOTE,
                    "1k: the paper says a 64th of the rows; which ones, and how many epochs, is not published.",
                ),
            ),
            Recipe("direft", "paper", MODEL, LOREFT, PAPER, (LAYERS_NOTE,)),
            Recipe("red", "paper", MODEL, RED, "RED's scripts", RED_NOTES),
        ),
        notes=(
            "the paper's score is AlpacaEval 1.0's win rate over text-davinci-003 by a judge (alpaca_eval_gpt4), which "
            "is no part of reft; `reft infer RUN --input` writes the answers for it, and `reft eval` has the loss on "
            "those of text-davinci-003.",
            "whether the published scores are of two seeds or three is not known.",
        ),
    ),
)
