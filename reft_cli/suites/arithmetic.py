"""Arithmetic reasoning: worked solutions are learned, the final number or letter is scored.

Wu et al., 2024 (arXiv 2404.03592), with the data of Hu et al., 2023 (LLM-Adapters); GSM8K alone as LoftQ has it, the
set that the paper chose its hyperparameters on.
"""

from __future__ import annotations

from typing import Any

from reft_cli.suites.commonsense import CODE, DATA, README, recipes, source
from reft_cli.suites.recipe import Recipe, Suite

SETS = ("AQuA", "gsm8k", "mawps", "SVAMP")
LEAKED = ("MultiArith", "AddSub", "SingleEq")  # test rows stand in the training data, so the paper leaves them out
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
STRICT_NOTE = (
    "task.extraction: arithmetic is the published rule, by which a letter is the first capital A to E of the answer "
    "(the A of `Adam`) and 3, 4 is 34; arithmetic_strict repairs both and is not comparable to published scores."
)
DECODING_NOTE = (
    "decoding: the paper names 4 beams, temperature 0.3, top_p 0.75 and top_k 40, the published command is greedy; "
    "which of them its table used is not known. For the paper's: "
    "generation: {beams: 4, temperature: 0.3, top_p: 0.75, top_k: 40}."
)
SCORING: dict[str, Any] = {
    "task.kind": "causal_lm",
    "task.metric": "numeric_match",
    "task.extraction": "arithmetic",
    "data.template": {"prompt": PROMPT, "completion": "{output}", "reference": "{answer}"},
    "data.max_length": 512,
    "data.on_overflow": "truncate_answer",
    "generation.max_new_tokens": 512,
    "data.train": {"path": f"{DATA}/ft-training_set/math_10k.json", "local": "math_10k", "split": "train"},
}
SOURCES = {
    "task": f"{CODE}, after LLM-Adapters",
    "data.train": "LLM-Adapters",
    "data.test": "LLM-Adapters",
    "data": CODE,
    "generation": f"{README}, greedy",
}
RECIPES = recipes(epochs=12.0)
WHOLE = Suite(
    name="arithmetic",
    about="AQuA, GSM8K, MAWPS and SVAMP, trained on 10k worked solutions",
    values=SCORING | {"data.test": [source(name, "test") for name in SETS]},
    sources=SOURCES,
    recipes=RECIPES,
    notes=(DECODING_NOTE, STRICT_NOTE),
)


def _single(name: str) -> Suite:
    leaked = (f"rows of {name}'s test set stand in the training data; the paper does not report it.",)
    return Suite(
        name=f"arithmetic/{name.lower()}",
        about=f"the same training, scored on {name} alone",
        values=SCORING | {"data.test": source(name, "test")},
        sources=SOURCES,
        recipes=RECIPES,
        notes=(DECODING_NOTE, STRICT_NOTE, *(leaked if name in LEAKED else ())),
    )


def _gsm8k(split: str, **more: str) -> dict[str, str]:
    return {"path": "openai/gsm8k", "subset": "main", "local": "gsm8k/main", "split": split} | more


def _with(values: dict[str, Any], name: str) -> tuple[Recipe, ...]:
    source = f"{README}, for arithmetic"
    return tuple(
        Recipe(each.method, name, each.model, dict(each.values) | values, source, each.notes)
        for each in RECIPES
        if each.name in ("paper", "untied")
    )


GSM8K = Suite(
    name="arithmetic/gsm8k",
    about="GSM8K's own training rows and prompt; the last 300 training rows choose, as in the paper's search",
    values={
        "task.kind": "causal_lm",
        "task.metric": "numeric_match",
        "task.extraction": "number",
        "data.train": _gsm8k("train[:-300]"),
        "data.validation": _gsm8k("train[-300:]"),
        "data.test": _gsm8k("test"),
        "data.format": "auto",
        "data.template": {
            "prompt": "{question}\nAnswer the above question. First think step by step and then answer the final "
            "number.\n",
            "completion": "{answer}",
            "replace": {"####": "The final answer is: "},
        },
        "data.max_length": 512,
        "data.on_overflow": "truncate_answer",
        "generation.max_new_tokens": 256,
    },
    sources={
        "task": CODE,
        "data": f"{CODE}, after LoftQ",
        "generation": f"{CODE}, greedy",
    },
    recipes=_with({}, "paper"),
    notes=(
        "the final run of the paper trains on all rows and has no validation: data.train.split: train, "
        "data.validation: null.",
        "the first version of the published code had another prompt (Alpaca's with an input), and sampled at "
        "temperature 0.8; for Llama-3-8B-Instruct it uses the "
        "chat template with a system prompt (data.template: chat is the nearest). "
        "Its other decoding is temperature 0.1, top_p 0.95, top_k 40.",
    ),
)
SUITES = (WHOLE, *(_single(name) for name in (*SETS, *LEAKED) if name != "gsm8k"), GSM8K)
