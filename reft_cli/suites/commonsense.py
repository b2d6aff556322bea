"""Commonsense reasoning: eight multiple-choice sets in the wording of LLM-Adapters, learned together.

Wu et al., 2024 (arXiv 2404.03592), with the data of Hu et al., 2023 (LLM-Adapters). BoolQ comes without its passages.
"""

from __future__ import annotations

from typing import Any

from reft_cli.suites.recipe import Recipe, Suite

DATA = "https://raw.githubusercontent.com/aryamanarora/LLM-Adapters/main"
SETS = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
MODELS = "yahma/llama-7b-hf, yahma/llama-13b-hf, meta-llama/Llama-2-7b-hf, meta-llama/Meta-Llama-3-8B"

CODE, README, PAPER = "pyreft's code", "pyreft's README", "ReFT paper"
LOREFT = {
    "intervention.layers": "all",
    "intervention.positions": "f7+l7",
    "intervention.rank": 8,
    "intervention.tied": True,
    "intervention.dropout": 0.0,
    "train.learning_rate": 9e-4,
    "train.warmup_ratio": 0.1,
    "train.schedule": "linear",
    "train.weight_decay": 0.0,
    "train.epochs": 6.0,
    "train.global_batch_size": 32,
}
DIREFT = LOREFT | {
    "intervention.rank": 4,
    "intervention.tied": False,
    "intervention.dropout": 0.05,
    "intervention.dropout_on": "output",
    "train.warmup_ratio": 0.0,
}
DIREFT_NOTES = (
    "DiReFT: the paper leaves open whether its table is of rank 4 untied (recipe untied, as in a published command) or "
    "of rank 8 tied (recipe tied); both have 2,097,408 parameters on a 7B model. Warm-up 0 is of that command too.",
    "DiReFT: the published weight decay of 0.06 never reached the interventions, so it is 0 here.",
)
DECODING_NOTE = (
    "decoding: the published command is greedy, the code's other setting 4 beams, temperature 0.1, top_p 0.75, top_k "
    "40; which of them the paper's table used is not known."
)


def recipes(*, epochs: float) -> tuple[Recipe, ...]:
    """The recipes that commonsense and arithmetic share but for the epochs."""
    whole = {"train.epochs": epochs}
    short = {"train.epochs": 3.0, "train.global_batch_size": 16}
    return (
        Recipe("loreft", "paper", MODELS, LOREFT | whole, README),
        Recipe("loreft", "3-epochs", MODELS, LOREFT | short, f"{PAPER}, three epochs"),
        Recipe("direft", "untied", MODELS, DIREFT | whole, f"{README} and {PAPER}", DIREFT_NOTES),
        Recipe(
            "direft",
            "tied",
            MODELS,
            DIREFT | whole | {"intervention.rank": 8, "intervention.tied": True},
            f"{README} and {PAPER}",
            DIREFT_NOTES,
        ),
    )


def source(name: str, split: str) -> dict[str, Any]:
    """One of the sets, at LLM-Adapters or as a folder of `data.folder`."""
    return {"path": f"{DATA}/dataset/{name}/{split}.json", "local": name, "split": split, "name": name}


SCORING = {
    "task.kind": "causal_lm",
    "task.metric": "exact_match",
    "task.extraction": {"after": "the correct answer is "},
    "data.template": {
        "prompt": "{instruction}\n",
        "completion": "the correct answer is {answer}",
        "reference": "{answer}",
    },
    "data.max_length": 512,
    "data.on_overflow": "truncate_answer",
    "generation.max_new_tokens": 32,
}
SOURCES = {
    "task": CODE,
    "data.train": "LLM-Adapters",
    "data.test": "LLM-Adapters",
    "data": CODE,
    "generation": f"{README}, greedy",
}
WHOLE = Suite(
    name="commonsense",
    about="eight multiple-choice sets, trained on the 170k rows of all of them",
    values=SCORING
    | {
        "data.train": {
            "path": f"{DATA}/ft-training_set/commonsense_170k.json",
            "local": "commonsense_170k",
            "split": "train",
        },
        "data.test": [source(name, "test") for name in SETS],
    },
    sources=SOURCES,
    recipes=recipes(epochs=6.0),
    notes=(DECODING_NOTE,),
)


def _single(name: str) -> Suite:
    return Suite(
        name=f"commonsense/{name.lower()}",
        about=f"{name} alone",
        values=SCORING | {"data.train": source(name, "train"), "data.test": source(name, "test")},
        sources=SOURCES,
        recipes=WHOLE.recipes,
        notes=(f"the paper never trains on {name} alone: prompt, scoring and recipe are those of commonsense.",),
    )


SUITES = (WHOLE, *map(_single, SETS))
