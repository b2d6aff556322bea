"""A small stand-in for lm-evaluation-harness: the calls that reft makes, on tasks of three kinds."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import yaml


class TemplateLM:
    """Texts to tokens as lm-eval does it."""

    def __init__(self) -> None:
        self.cached: list[tuple[str, Any]] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda kind, request, answer: self.cached.append((kind, request)))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self.tok_encode(context)
        return before, self.tok_encode(context + continuation)[len(before) :]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        asked = []
        for context, continuation in (request.args for request in requests):
            pair = self._encode_pair(context, continuation) if context else None
            alone = ([self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False))
            asked.append(((context, continuation), *(pair or alone)))
        return self._loglikelihood_tokens(asked, disable_tqdm=disable_tqdm)


def windows(*, token_list, prefix_token, max_seq_len, context_len):
    """Windows of `max_seq_len` tokens, each after one token of context."""
    assert context_len == 1
    for start in range(0, len(token_list), max_seq_len):
        part = token_list[start : start + max_seq_len]
        yield [token_list[start - 1] if start else prefix_token, *part[:-1]], part


def disjoint(pair):
    before, part = pair
    return before[: len(before) - (len(part) - 1)], part


@dataclass
class TaskManager:
    """Tasks in a folder."""

    include_path: str | None = None
    tasks: dict[str, dict] = field(init=False)

    def __post_init__(self) -> None:
        files = sorted(Path(self.include_path).glob("*.yaml")) if self.include_path else []
        self.tasks = {file.stem: yaml.safe_load(file.read_text()) for file in files}

    @property
    def all_tasks(self) -> list[str]:
        return list(self.tasks)

    def match_tasks(self, names: list[str]) -> list[str]:
        return [task for task in self.tasks if any(fnmatch(task, name) for name in names)]

    def load(self, names: list[str]) -> None:
        for name in names:
            self.rows(name)

    def rows(self, name: str) -> list[dict]:
        (file,) = self.tasks[name]["dataset_kwargs"]["data_files"].values()
        return [json.loads(line) for line in Path(file).read_text().splitlines()]


def simple_evaluate(*, model, model_args, tasks, task_manager, limit, **settings):
    """Accuracy, exact match or perplexity of each task."""
    results, samples = {}, {}
    for name in tasks:
        rows = task_manager.rows(name)[:limit]
        kind = task_manager.tasks[name]["output_type"]
        score = {"multiple_choice": _choose, "generate_until": _write, "loglikelihood_rolling": _roll}[kind]
        metric, value, resps = score(model, rows, task_manager.tasks[name])
        results[name] = {"alias": name, f"{metric},none": value, f"{metric}_stderr,none": 0.1}
        samples[name] = [{"doc": row, "resps": each} for row, each in zip(rows, resps, strict=True)]
    about = {"configs": {}, "versions": {}, "n-samples": {}}
    return {"results": results, "samples": samples, "config": {"model_args": model_args, "limit": limit}} | about


def _choose(model, rows, task):
    choices = task["doc_to_choice"]
    requests = [SimpleNamespace(args=(f"{row['text']} ->", f" {each}")) for row in rows for each in choices]
    found = model.loglikelihood(requests)
    pairs = [found[index : index + len(choices)] for index in range(0, len(found), len(choices))]
    guesses = [max(range(len(choices)), key=lambda each, pair=pair: pair[each][0]) for pair in pairs]
    hits = [choices[guess] == row["label"] for guess, row in zip(guesses, rows, strict=True)]
    return "acc", sum(hits) / len(hits), [[[score] for score in pair] for pair in pairs]


def _write(model, rows, task):
    asked = [SimpleNamespace(args=(f"{row['text']} ->", task["generation_kwargs"])) for row in rows]
    texts = model.generate_until(asked)
    hits = [text == f" {row['label']}" for text, row in zip(texts, rows, strict=True)]
    return "exact_match", sum(hits) / len(hits), [[text] for text in texts]


def _roll(model, rows, task):
    found = model.loglikelihood_rolling([SimpleNamespace(args=(row["text"],)) for row in rows])
    size = sum(len(row["text"].encode()) for row in rows)
    return "byte_perplexity", math.exp(-sum(found) / size), [[each] for each in found]


class EvaluationTracker:
    """Writes results where lm-eval writes them."""

    def __init__(self, output_path: str) -> None:
        self.path = Path(output_path)
        self.general_config_tracker = SimpleNamespace(log_experiment_args=lambda *facts: None)

    def save_results_aggregated(self, results, samples) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = results | {"task_hashes": dict.fromkeys(samples, "")}
        self.path.with_name(f"{self.path.stem}_2026.json").write_text(json.dumps(whole))

    def save_results_samples(self, task_name, samples) -> None:
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        (self.path.parent / f"samples_{task_name}_2026.jsonl").write_text(lines)


def modules() -> dict[str, ModuleType]:
    """The stand-in under the names that are imported."""
    contents = {
        "lm_eval": {"simple_evaluate": simple_evaluate, "__version__": "0.0"},
        "lm_eval.api": {},
        "lm_eval.api.model": {"TemplateLM": TemplateLM},
        "lm_eval.utils": {"get_rolling_token_windows": windows, "make_disjoint_window": disjoint},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.loggers": {"EvaluationTracker": EvaluationTracker},
    }
    made = {}
    for name, values in contents.items():
        made[name] = ModuleType(name)
        made[name].__spec__ = ModuleSpec(name, None)
        vars(made[name]).update(values)
    return made


def install(monkeypatch) -> None:
    """Put the stand-in in lm-eval's place until the test ends."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "reft_cli.evaluation.lm_eval_model", raising=False)
