#!/usr/bin/env python3
"""Scores of methods and settings on real tasks: many short training runs, means and spreads over seeds.

    study.py --data FOLDER --output RESULTS.jsonl [--tasks sst2 ...] [--answers text head] [--methods loreft ...]
             [--rates 5e-3 ...] [--seeds 0 1 2] [--processes N] [--set KEY=VALUE ...] [--table best|all]

Every combination of the flags is a run, and a line of RESULTS.jsonl when it is done; runs that have a line are not made
again, so that a study goes on where it was stopped. Each of the processes makes run after run on one core, or with
--device cuda on a share of a GPU, by `reft_cli.runs`: what `reft train` and `reft eval` do, and nothing else.

FOLDER has TASK.train.jsonl and TASK.validation.jsonl, as TASKS below names them. A run learns from the first --rows of
the training rows. It is scored on `choice`, up to 1,000 of the training rows behind these, and on `score`, the
validation rows. The table names the best settings by `choice` and gives both, so that nothing is chosen on `score`.

--answers text    the label is written: exact match of the greedily decoded answer (or Matthews' correlation of it)
--answers head    a classification head is trained along with the edits; its accuracy (or Matthews' correlation)

Besides reft's methods: `lora`, PEFT's LoRA of the rank on all linear layers, alpha twice the rank, on the same batches
with the same schedule (text only; needs peft); `probe`, scikit-learn's logistic regression on the frozen model's last
hidden state at the last prompt token, its C chosen by three-fold cross-validation on the training rows; `frozen`, the
likelier one of all labels under the frozen model (text only); `majority`, the most frequent label of the training rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from reft_cli.data.examples import Example
    from reft_cli.models.intervened import IntervenedModel
    from reft_cli.runs.texts import TextSide
    from reft_cli.spec.load import LoadedSpec

CHOICE = 1000  # most rows that settings are chosen on
SHARE = 0.8  # most of the training rows that are learned from
BUDGET = 8192  # tokens of a pass of the frozen model
FIXED = ("probe", "frozen", "majority")  # they have no settings and no seeds


@dataclass(frozen=True)
class Task:
    """Where a task's rows are below --data, and how they are written. `replace` are labels in other words."""

    path: str
    prompt: str
    completion: str = " {label_name}"
    replace: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    """Of a head, where the columns have other names than text, or sentence1 and sentence2, and label."""
    matthews: bool = False


INSTRUCTION = {"text": "instruction", "label": "answer"}
KINDS_OF_QUESTION = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}
TASKS = {
    "sst2": Task("glue/sst2", "Review: {text}\nSentiment:"),
    "trec": Task("classify/trec", "Question: {text}\nType:", replace=KINDS_OF_QUESTION),
    "ag_news": Task("classify/ag_news", "News: {text}\nTopic:"),
    "cola": Task("glue/cola", "Sentence: {text}\nGrammar:", matthews=True),
    "mrpc": Task(
        "glue/mrpc",
        "First: {sentence1}\nSecond: {sentence2}\nThe same meaning:",
        replace={"not_equivalent": "no", "equivalent": "yes"},
    ),
    "rte": Task(
        "glue/rte",
        "Text: {sentence1}\nClaim: {sentence2}\nFollows:",
        replace={"not_entailment": "no", "entailment": "yes"},
    ),
    "boolq": Task("commonsense/boolq", "{instruction}\nAnswer:", " {answer}", columns=INSTRUCTION),
    "piqa": Task("commonsense/piqa", "{instruction}\nAnswer:", " {answer}", columns=INSTRUCTION),
}


@dataclass(frozen=True)
class Config:
    """One run. None: has no meaning for the method."""

    task: str
    answer: str
    method: str
    positions: str | None
    init: str | None
    rank: int | None
    layers: str | None
    rate: float | None
    epochs: float | None
    warmup: float | None
    rows: int
    sets: tuple[str, ...]
    seed: int

    @classmethod
    def of(cls, **values: Any) -> Config:
        """A run without the settings that its method does not have."""
        method = values["method"]
        without: tuple[str, ...] = {"lora": ("positions", "init", "layers"), "red": ("init", "rank")}.get(method, ())
        if method in FIXED:
            without = ("positions", "init", "rank", "layers", "rate", "epochs", "warmup")
            values["seed"] = 0
        return cls(**values | dict.fromkeys(without))

    @property
    def key(self) -> str:
        """What tells it from other runs."""
        return json.dumps(asdict(self), sort_keys=True)


def plan(args: argparse.Namespace) -> list[Config]:
    """Every combination of the flags, each once; seeds first, so that a stopped study has whole settings."""
    names = ("task", "answer", "method", "positions", "init", "rank", "layers", "rate", "epochs", "warmup", "seed")
    lists = (getattr(args, name) for name in names)
    found = [
        Config.of(**dict(zip(names, values, strict=True)), rows=args.rows, sets=tuple(args.set))
        for values in itertools.product(*lists)
    ]
    return [each for each in dict.fromkeys(found) if each.answer == "text" or each.method not in ("lora", "frozen")]


def spec_of(config: Config, *, data: str, model: str) -> dict[str, Any]:
    """The spec of a run; `choice` and `score` are the two sources of its test rows."""
    task = TASKS[config.task]
    rows = min(config.rows, int(SHARE * _count(Path(data) / f"{task.path}.train.jsonl")))
    text = config.answer == "text"
    spec: dict[str, Any] = {
        "model": {"name": model, "dtype": "float32"},
        "task": {"kind": "causal_lm" if text else "classification"} | ({"metric": "matthews"} if task.matthews else {}),
        "data": {
            "folder": data,
            "train": {"local": task.path, "split": f"train[:{rows}]"},
            "test": [
                {"local": task.path, "split": f"train[{rows}:{rows + CHOICE}]", "name": "choice"},
                {"local": task.path, "split": "validation", "name": "score"},
            ],
            "max_length": 256,
            "on_overflow": "truncate_prompt",
        },
        "intervention": {
            key: getattr(config, key)
            for key in ("method", "positions", "init", "rank", "layers")
            if config.method not in ("lora", *FIXED) and getattr(config, key) is not None
        },
        "train": {"seed": config.seed}
        | ({} if config.method in FIXED else {"epochs": config.epochs, "learning_rate": config.rate})
        | ({} if config.method in FIXED else {"warmup_ratio": config.warmup}),
        "evaluation": {"every": "never"},
        "generation": {"max_new_tokens": 8},
    }
    if text:
        spec["data"]["template"] = {"prompt": task.prompt, "completion": task.completion, "replace": task.replace}
    elif task.columns:
        spec["data"]["columns"] = task.columns
    return spec


def _count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def run(config: Config, *, data: str, model: str) -> dict[str, Any]:
    """Make one run and score it. ReftErrors, such as a diverged loss, are results."""
    from reft_cli.errors import ReftError
    from reft_cli.spec.load import load_spec

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yaml"
        path.write_text(json.dumps(spec_of(config, data=data, model=model)))  # JSON is YAML
        try:
            loaded = load_spec(path, overrides=config.sets)
            found = SIDES.get(config.method, trained)(config, loaded, Path(folder) / "run")
        except ReftError as error:
            found = {"error": str(error)}
    return asdict(config) | found | {"seconds": round(time.perf_counter() - started, 1)}


def trained(config: Config, loaded: LoadedSpec, output: Path) -> dict[str, Any]:
    """An intervention, as `reft train` and `reft eval` have it."""
    from reft_cli import runs
    from reft_cli.runfolder import RunFolder
    from reft_cli.training.observer import NullObserver

    result = runs.train(loaded, output=output, observer=NullObserver())
    report = runs.evaluate(result.run, checkpoint="last", observer=NullObserver())
    books = RunFolder(result.run).read()
    return {"trainable": books["trainable"], "devices": books["devices"], **_parts(report.metrics)}


def _parts(metrics: dict[str, float]) -> dict[str, float]:
    """The scores of the two sources."""
    return {name.partition("/")[2]: value for name, value in metrics.items() if "/" in name}


def lora(config: Config, loaded: LoadedSpec, _: Path) -> dict[str, Any]:
    """PEFT's LoRA on the batches and with the schedule that reft would take; scored as merged weights."""
    import peft
    from torch.nn.functional import cross_entropy
    from torch.nn.utils import clip_grad_norm_
    from torch.optim import AdamW

    from reft_cli.data.batch import build_batch
    from reft_cli.runs.assemble import build_from_spec
    from reft_cli.training.schedule import Order, rate_factor
    from reft_cli.training.state import seed_everything

    assert config.rank is not None and config.rate is not None
    text, examples, scored, base = _loaded(loaded)
    settings, device = loaded.spec.train, next(base.model.parameters()).device
    seed_everything(config.seed)
    asked = peft.LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules="all-linear")
    adapted = peft.get_peft_model(base.model, asked).train()
    weights = [each for each in adapted.parameters() if each.requires_grad]
    optimizer = AdamW(weights, lr=config.rate, weight_decay=settings.weight_decay)
    order = Order(len(examples), settings.global_batch_size, config.seed)
    steps = order.steps(settings.epochs, settings.max_steps)
    for step in range(steps):
        permutation = order.permutation(step // order.steps_per_epoch)
        chosen = [examples[index] for index in order.global_batch(step, permutation)]
        batch = build_batch(chosen, groups=(), layout="padded", pad_token_id=_pad(text)).to(device)
        logits = adapted(**batch.inputs, use_cache=False).logits.flatten(0, 1)[batch.answer_rows]  # [K, V]
        cross_entropy(logits.float(), batch.targets).backward()
        clip_grad_norm_(weights, settings.max_grad_norm or math.inf)
        warmup = math.ceil(settings.warmup_ratio * steps)
        for group in optimizer.param_groups:
            group["lr"] = config.rate * rate_factor(step, steps=steps, warmup_steps=warmup, schedule=settings.schedule)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    count = sum(each.numel() for each in weights)
    merged = replace(base, model=adapted.merge_and_unload().eval())
    model = build_from_spec(merged, loaded.spec)
    return {"trainable": count, "devices": [device.type], **_unedited_scores(model, loaded, text, scored)}


def _unedited_scores(
    model: IntervenedModel, loaded: LoadedSpec, text: TextSide, scored: Sequence[Example]
) -> dict[str, float]:
    """The scores of a base model by generation."""
    from reft_cli.runs.assemble import best_metric, decoding_of, evaluator_of
    from reft_cli.runs.texts import without_answers

    evaluator = evaluator_of(
        text,
        metric=best_metric(loaded.spec),
        decoding=decoding_of(loaded.spec.generation),
        batch_size=None,
        device=model.device,
        tied=True,
    )
    with model:
        return _parts(evaluator.run(model, scored, prompts=without_answers(scored), edited=False).metrics)


def probe(config: Config, loaded: LoadedSpec, _: Path) -> dict[str, Any]:
    """A linear probe of the last hidden state at the last prompt token."""
    import numpy as np
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    text, examples, scored, base = _loaded(loaded)
    classifier = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=np.logspace(-4, 1, 6), cv=3, max_iter=2000))
    classifier.fit(_last_states(base.model, examples, _pad(text)), [_label(each) for each in examples])
    return _scores(loaded, scored, classifier.predict(_last_states(base.model, scored, _pad(text))).tolist())


def majority(config: Config, loaded: LoadedSpec, _: Path) -> dict[str, Any]:
    """The most frequent label of the training rows."""
    _, examples, scored, _ = _loaded(loaded)
    most = Counter(map(_label, examples)).most_common(1)[0][0]
    return _scores(loaded, scored, [most] * len(scored))


def frozen(config: Config, loaded: LoadedSpec, _: Path) -> dict[str, Any]:
    """The likelier one of all labels, end token included, under the frozen model."""
    import torch

    from reft_cli.data.batch import build_batch, micro_batches
    from reft_cli.runs.assemble import build_from_spec
    from reft_cli.tasks.likelihood import likelihoods

    text, examples, scored, base = _loaded(loaded)
    answers = {_label(each): each.input_ids[each.prompt_length :] for each in examples}
    model = build_from_spec(base, loaded.spec)
    chances: dict[str, list[float]] = {}
    for label, answer in answers.items():
        asked = [
            replace(each, input_ids=each.input_ids[: each.prompt_length] + answer, row=at)
            for at, each in enumerate(scored)
        ]
        found = [0.0] * len(scored)
        for chosen in micro_batches(asked, token_budget=BUDGET, rows=None, padded=True):
            batch = build_batch(chosen, groups=(), layout="padded", pad_token_id=_pad(text)).to(model.device)
            with model, model.editing(None), torch.inference_mode():
                sums = likelihoods(model, batch)[0].view(len(chosen), len(answer)).sum(1)  # [B]
            for each, chance in zip(chosen, sums.tolist(), strict=True):
                found[each.row] = chance
        chances[label] = found
    likelier = [max(chances, key=lambda label: chances[label][at]) for at in range(len(scored))]
    return _scores(loaded, scored, likelier)


def _loaded(loaded: LoadedSpec) -> tuple[TextSide, list[Example], list[Example], Any]:
    """(text side, training examples, examples to score, base model)."""
    from reft_cli.models.loading import load_tokenizer
    from reft_cli.runs.assemble import base_source, load_base
    from reft_cli.runs.sources import rows_of
    from reft_cli.runs.texts import load_training_data

    source = base_source(loaded.spec.model)
    data = load_training_data(loaded.spec, load_tokenizer(source))
    scored = data.text.encode(rows_of(loaded.spec, "test")).examples
    return data.text, list(data.train.examples), list(scored), load_base(source, data.text, seed=0)


def _pad(text: TextSide) -> int:
    found = text.tokenizer.pad_token_id
    return int(found or 0)


def _label(example: Example) -> str:
    """The answer as text, or the class's number."""
    return example.completion.strip() if example.label is None else str(example.label)


def _scores(loaded: LoadedSpec, scored: Sequence[Example], guesses: Sequence[str]) -> dict[str, float]:
    """The score of each part, of guessed labels."""
    from reft_cli.evaluation.metrics import by_source, score_texts

    metric, truths = str(loaded.spec.task.metric), [_label(each) for each in scored]

    def score(rows: list[int]) -> float:
        return score_texts(metric, [guesses[at] for at in rows], [truths[at] for at in rows])

    return _parts(by_source(metric, [each.source for each in scored], score))


def _last_states(model: Any, examples: Sequence[Example], pad_token_id: int) -> np.ndarray:
    """The last hidden state at the last prompt token of every row, [rows, D]."""
    import numpy as np
    import torch

    from reft_cli.data.batch import build_batch, micro_batches
    from reft_cli.runs.texts import without_answers

    found: dict[int, np.ndarray] = {}
    prompts = without_answers(examples)
    device = next(model.parameters()).device
    with torch.inference_mode():
        for chosen in micro_batches(prompts, token_budget=BUDGET, rows=None, padded=True):
            batch = build_batch(chosen, groups=(), layout="padded", pad_token_id=pad_token_id).to(device)
            states = model.base_model(**batch.inputs).last_hidden_state.float()  # [B, T, D]
            for example, row in zip(chosen, states, strict=True):
                found[id(example)] = row[example.prompt_length - 1].cpu().numpy()
    return np.stack([found[id(each)] for each in prompts])


SIDES = {"lora": lora, "probe": probe, "majority": majority, "frozen": frozen}


# ---- all runs


def _settle(devices: Any) -> None:
    """In a new process: one core, and the GPU that it shares, if any."""
    os.environ["CUDA_VISIBLE_DEVICES"] = devices.get()
    import torch

    torch.set_num_threads(1)


def _job(job: tuple[Config, str, str]) -> dict[str, Any]:
    config, data, model = job
    return run(config, data=data, model=model)


def make(configs: Sequence[Config], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Results as they come."""
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = "1"
    devices = context.Queue()
    for number in range(args.processes):
        devices.put(str(number % args.gpus) if args.gpus else "")
    jobs = [(config, args.data, args.model) for config in configs]
    with context.Pool(args.processes, _settle, (devices,)) as pool:
        yield from pool.imap_unordered(_job, jobs)


# ---- the table


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; one that a kill cut off does not count."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def key_of(result: dict[str, Any]) -> str:
    """`Config.key` of a result."""
    names = {each.name for each in fields(Config)}
    return json.dumps({name: value for name, value in result.items() if name in names}, sort_keys=True)


def settings(result: dict[str, Any]) -> str:
    """What was set, in words."""
    names = ("positions", "init", "layers", "rank", "rate", "epochs", "warmup")
    found = [
        f"{name} {result[name]:g}" if name == "rate" else f"{name} {result[name]}" for name in names if result[name]
    ]
    return ", ".join(found + list(result["sets"])) or "–"


def spread(numbers: Sequence[float]) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.3f}{deviation}"


def table(results: Iterable[dict[str, Any]], *, best: bool) -> str:
    """Markdown: a line for each settings of each method, the best by `choice` first, or alone."""
    groups: dict[tuple[str, str, str], dict[str, list[dict[str, Any]]]] = {}
    for each in results:
        group = groups.setdefault((each["task"], each["answer"], each["method"]), {})
        group.setdefault(f"{settings(each)}, {each['rows']:,} rows", []).append(each)
    lines = ["| task | answer | method | trainable | settings | runs | choice | score |", "|---" * 8 + "|"]
    for (task, answer, method), group in groups.items():
        whole = {name: runs for name, runs in group.items() if not any("error" in each for each in runs)}
        ranked = sorted(whole, key=lambda name: -statistics.mean(each["choice"] for each in whole[name]))
        for name in ranked[:1] if best else ranked:
            runs = whole[name]
            scores = (spread([each[part] for each in runs]) for part in ("choice", "score"))
            count = f"{runs[0]['trainable']:,}" if "trainable" in runs[0] else "–"
            lines.append("| " + " | ".join([task, answer, method, count, name, str(len(runs)), *scores]) + " |")
        for name in group.keys() - whole.keys() if not best else ():
            lines.append(f"| {task} | {answer} | {method} | – | {name} | {len(group[name])} | failed | |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="bundled:tiny-llama")
    parser.add_argument("--tasks", dest="task", nargs="+", choices=TASKS, default=["sst2"])
    parser.add_argument("--answers", dest="answer", nargs="+", choices=("text", "head"), default=["text"])
    parser.add_argument("--methods", dest="method", nargs="+", default=["loreft"])
    parser.add_argument("--positions", nargs="+", default=["prompt"])
    parser.add_argument("--inits", dest="init", nargs="+", default=["paper"])
    parser.add_argument("--ranks", dest="rank", nargs="+", type=int, default=[4])
    parser.add_argument("--layers", nargs="+", default=["all"])
    parser.add_argument("--rates", dest="rate", nargs="+", type=float, default=[5e-3])
    parser.add_argument("--epochs", nargs="+", type=float, default=[2.0])
    parser.add_argument("--warmups", dest="warmup", nargs="+", type=float, default=[0.0])
    parser.add_argument("--seeds", dest="seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that the processes share; 0: CPU cores")
    parser.add_argument("--table", choices=("best", "all"), default="best")
    return parser.parse_args()


def main() -> None:
    """Make the runs that are missing and print the table of all."""
    args = arguments()
    there = {key_of(each) for each in read(args.output)}
    missing = [each for each in plan(args) if each.key not in there]
    print(f"{len(missing)} runs", file=sys.stderr, flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("a") as file:
        for done, result in enumerate(make(missing, args) if missing else (), start=1):
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(f"{done}/{len(missing)} {settings(result)}: {result.get('score')}", file=sys.stderr, flush=True)
    print(table(read(args.output), best=args.table == "best"))


if __name__ == "__main__":
    main()
