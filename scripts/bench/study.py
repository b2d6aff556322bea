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
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reft_cli.spec.load import LoadedSpec

CHOICE = 1000  # most rows that settings are chosen on
SHARE = 0.8  # most of the training rows that are learned from
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


def spec_of(config: Config, *, data: str, model: str, layout: str = "auto") -> dict[str, Any]:
    """The spec of a run; `choice` and `score` are the two sources of its test rows."""
    task = TASKS[config.task]
    rows = min(config.rows, int(SHARE * _count(Path(data) / f"{task.path}.train.jsonl")))
    text = config.answer == "text"
    schedule = {"epochs": config.epochs, "learning_rate": config.rate, "warmup_ratio": config.warmup}
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
        "train": {"seed": config.seed, "layout": layout} | ({} if config.method in FIXED else schedule),
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


def run(config: Config, *, data: str, model: str, layout: str = "auto") -> dict[str, Any]:
    """Make one run and score it. ReftErrors, such as a diverged loss, are results."""
    from study_sides import SIDES

    from reft_cli.errors import Interrupted, ReftError
    from reft_cli.spec.load import load_spec

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yaml"
        path.write_text(json.dumps(spec_of(config, data=data, model=model, layout=layout)))  # JSON is YAML
        try:
            loaded = load_spec(path, overrides=config.sets)
            side = SIDES.get(config.method)
            found = side(loaded, config.rank or 0) if side else trained(loaded, Path(folder) / "run")
        except Interrupted:
            sys.exit(143)  # a worker of the pool would take any Exception for a result and wait for more
        except ReftError as error:
            found = {"error": str(error)}
    return asdict(config) | found | {"seconds": round(time.perf_counter() - started, 1)}


def trained(loaded: LoadedSpec, output: Path) -> dict[str, Any]:
    """An intervention, as `reft train` and `reft eval` have it."""
    from study_sides import parts

    from reft_cli import runs
    from reft_cli.runfolder import RunFolder
    from reft_cli.training.observer import NullObserver

    result = runs.train(loaded, output=output, observer=NullObserver())
    report = runs.evaluate(result.run, checkpoint="last", observer=NullObserver())
    books = RunFolder(result.run).read()
    return {"trainable": books["trainable"], "devices": books["devices"], **parts(report.metrics)}


# ---- all runs


def _settle(devices: Any) -> None:
    """In a new process: one core, and the GPU that it shares, if any."""
    os.environ["CUDA_VISIBLE_DEVICES"] = devices.get()
    import torch

    torch.set_num_threads(1)


def _job(job: tuple[Config, str, str, str]) -> dict[str, Any]:
    config, data, model, layout = job
    return run(config, data=data, model=model, layout=layout)


def make(configs: Sequence[Config], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Results as they come."""
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = "1"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(args.gpus)))).split(",")[: args.gpus]
    devices = context.Queue()
    for number in range(args.processes):
        devices.put(visible[number % args.gpus] if args.gpus else "")
    layout = "padded" if args.gpus else "auto"  # packed attention in float32 is slow on a GPU
    jobs = [(config, args.data, args.model, layout) for config in configs]
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the processes too
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
