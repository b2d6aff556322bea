#!/usr/bin/env python3
"""GLUE tasks on one encoder: ours beside pyreft, the same hyperparameters, tokens and order of rows, in turn by seed.

    glue.py --model ENCODER --data FOLDER --results RESULTS.jsonl [--tasks rte mrpc ...] [--seeds 42 43 44 45 46]
            [--sides reft pyreft] [--rows 2000] [--epochs 16] [--set KEY=VALUE ...] [--workers 1] [--timeout 1800]
            [--peer-python PYTHON | --peer-path FOLDER] [--markdown TABLE.md]

FOLDER has `glue/TASK.train.jsonl` and `glue/TASK.validation.jsonl`, with GLUE's columns, or `text`, or `sentence1` and
`sentence2`. Hyperparameters are those of the suite's recipe for LoReFT on a base-sized encoder, but for the epochs and
what `--set` changes, on both sides. A run is scored once, after its last step, on all validation rows.

    reft      `reft train` on the suite
    pyreft    its model, interventions, locations and compute_loss, AdamW, transformers' linear schedule; its model is
              given token types and its interventions are told of train and eval, both of which its own loop forgets
              (its squared error rounds labels to bfloat16, which torch 2.11 cannot differentiate; here float32)

Each side has processes of its own, in its own environment. Runs that stand in RESULTS are not made again; a run that
fails is a line there too, and is tried again by the next call. Without --model the table alone is written anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

RESULT = "result: "  # begins the line of a worker that is not chatter
TASKS = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
SPEC = """\
model: {{name: "{model}", dtype: float32}}
task: glue/{task}
intervention: {{method: loreft}}
data:
  columns: {columns}
  train: {{path: "{data}/glue/{task}.train.jsonl", limit: {rows}}}
  validation: "{data}/glue/{task}.validation.jsonl"
  test: "{data}/glue/{task}.validation.jsonl"
train: {{epochs: {epochs}, seed: {seed}}}
evaluation: {{every: never}}
"""


def columns_of(file: Path) -> dict[str, str]:
    """The columns to name in the spec; none where the file has GLUE's own."""
    with file.open(encoding="utf-8") as rows:
        names = json.loads(next(rows)).keys()
    if "sentence1" in names:
        return {"text": "sentence1", "text_pair": "sentence2"}
    return {"text": "text"} if "text" in names else {}


def plan_of(args: argparse.Namespace, task: str, seed: int, folder: Path) -> Path:
    """One task under one seed as a file that both sides read: hyperparameters, tokens, labels and the order of rows."""
    from reft_cli.models.loading import load_tokenizer
    from reft_cli.positions import Positions
    from reft_cli.runs.assemble import base_source
    from reft_cli.runs.texts import load_training_data
    from reft_cli.spec.load import load_spec
    from reft_cli.training.schedule import Order

    path = folder / f"{task}_{seed}.yaml"
    columns = columns_of(args.data / "glue" / f"{task}.train.jsonl")
    known = {name: getattr(args, name) for name in ("model", "data", "rows", "epochs")}
    path.write_text(SPEC.format(task=task, seed=seed, columns=json.dumps(columns), **known))
    spec = load_spec(path, overrides=args.set).spec
    data = load_training_data(spec, load_tokenizer(base_source(spec.model)))
    assert data.validation is not None
    train, edit = spec.train, spec.intervention
    first = Positions.parse(edit.positions).first
    order = Order(len(data.train.examples), train.global_batch_size, seed)
    steps = order.steps(train.epochs, train.max_steps)
    epochs = [order.permutation(epoch) for epoch in range(math.ceil(steps / order.steps_per_epoch))]
    batches = [list(order.global_batch(step, epochs[step // order.steps_per_epoch])) for step in range(steps)]
    plan = {
        "spec": str(path),
        "set": args.set,
        "model": args.model,
        "metric": spec.task.metric,
        "classes": len(data.text.labels or ()),
        "first": first,
        "rank": edit.rank,
        "dropout": edit.dropout,
        "learning_rate": train.learning_rate,
        "warmup": math.ceil(train.warmup_ratio * len(batches)),
        "clip": train.max_grad_norm,
        "seed": seed,
        "pad": data.text.tokenizer.pad_token_id,
        "batches": batches,
        "train": rows_of(data.train.examples),
        "validation": rows_of(data.validation.examples),
    }
    written = path.with_suffix(".json")
    written.write_text(json.dumps(plan))
    return written


def rows_of(examples: Any) -> list[dict[str, Any]]:
    """Tokens, token types and label of each row."""
    return [
        {"ids": each.input_ids, "types": each.token_types or [0] * len(each.input_ids), "label": each.label}
        for each in examples
    ]


def side_reft(plan: dict[str, Any]) -> dict[str, Any]:
    """Ours: `train` and `evaluate` on the spec."""
    from reft_cli import runs
    from reft_cli.spec.load import load_spec
    from reft_cli.training.observer import NullObserver

    loaded = load_spec(Path(plan["spec"]), overrides=plan["set"])
    with tempfile.TemporaryDirectory() as folder:
        done = runs.train(loaded, output=Path(folder) / "run", observer=NullObserver())
        report = runs.evaluate(done.run, checkpoint="last", observer=NullObserver())
    assert report.rows == len(plan["validation"]), "both sides are scored on the same rows"
    return {"score": report.metrics[plan["metric"]], "loss": done.metrics["loss"], "steps": done.step}


def side_pyreft(plan: dict[str, Any]) -> dict[str, Any]:
    """Theirs: as its GLUE script, but for the loop around it."""
    from transformers import get_linear_schedule_with_warmup, set_seed

    set_seed(plan["seed"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reft = peer_model(plan, device)
    trainable = list(reft.parameters())
    optimizer = torch.optim.AdamW(trainable, lr=plan["learning_rate"], weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, plan["warmup"], len(plan["batches"]))
    losses = []
    for chosen in plan["batches"]:
        reft.train()
        reft.interventions.train()
        loss, _ = peer_pass(reft, [plan["train"][row] for row in chosen], plan, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, plan["clip"] or math.inf)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    reft.eval()
    reft.interventions.eval()
    outputs: list[list[float]] = []
    with torch.no_grad():
        for start in range(0, len(plan["validation"]), 64):
            _, logits = peer_pass(reft, plan["validation"][start : start + 64], plan, device)
            outputs += logits.float().cpu().tolist()
    predictions = [row.index(max(row)) if plan["classes"] else row[0] for row in outputs]
    return {"predictions": predictions, "loss": float(torch.stack(losses[-10:]).mean()), "steps": len(losses)}


def peer_model(plan: dict[str, Any], device: str) -> Any:
    """pyreft's model: LoReFT after every block, and the head's last layer trained along (its flag allow_cls_grad)."""
    import pyreft
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        plan["model"], num_labels=plan["classes"] or 1, dtype=torch.float32
    )
    shape = {"embed_dim": model.config.hidden_size, "low_rank_dimension": plan["rank"]}
    representations = [
        {
            "component": f"{model.base_model_prefix}.encoder.layer[{layer}].output",
            "low_rank_dimension": plan["rank"],
            "intervention": pyreft.LoreftIntervention(**shape, dropout=plan["dropout"], dtype=torch.float32),
        }
        for layer in range(model.config.num_hidden_layers)
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations), set_device=False)
    reft.set_device(device)
    reft.model.classifier.requires_grad_(True)
    return reft


def peer_pass(reft: Any, rows: list[dict[str, Any]], plan: dict[str, Any], device: str) -> tuple[Any, Any]:
    """(loss, logits) by pyreft's compute_loss; a pad token at the end takes the edits that a row is too short for."""
    import pyreft

    width = max(len(row["ids"]) for row in rows) + 1
    ids, types = torch.full((len(rows), width), plan["pad"]), torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        length = len(row["ids"])
        ids[index, :length], types[index, :length] = torch.tensor(row["ids"]), torch.tensor(row["types"])
        mask[index, :length] = 1
    locations = [
        pyreft.get_intervention_locations(
            last_position=len(row["ids"]),
            first_n=plan["first"],
            last_n=0,
            num_interventions=len(reft.interventions),
            pad_mode="last",
        )
        for row in rows
    ]
    inputs = {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "labels": torch.tensor([row["label"] for row in rows], device=device),
        "intervention_locations": torch.tensor(locations),
    }

    def typed(given: dict[str, Any], **more: Any) -> Any:
        return reft(given | {"token_type_ids": types.to(device)}, **more)

    holder = SimpleNamespace(model=reft)
    loss, output = pyreft.ReftTrainerForSequenceClassification.compute_loss(holder, typed, inputs, return_outputs=True)
    if not plan["classes"]:
        loss = torch.nn.functional.mse_loss(output.logits.squeeze(-1), inputs["labels"])
    return loss, output.logits


SIDES = {"reft": side_reft, "pyreft": side_pyreft}


class Worker:
    """A process of one side that makes one run after the other, so that what it imports is imported once."""

    def __init__(self, side: str, args: argparse.Namespace) -> None:
        self.side, self.timeout = side, args.timeout
        peer = side == "pyreft"
        environment = dict(os.environ)
        if peer and (args.peer_path or args.peer_python):
            environment["PYTHONPATH"] = args.peer_path or ""
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [args.peer_python if peer and args.peer_python else sys.executable, __file__, "--side", side],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
        )

    def run(self, file: Path) -> dict[str, Any]:
        """What a run gives; {error} if the process ends in it, or is ended because it takes too long."""
        assert self.process.stdin is not None and self.process.stdout is not None
        clock = threading.Timer(self.timeout, self.process.kill)
        clock.start()
        try:
            with suppress(BrokenPipeError):
                print(file, file=self.process.stdin, flush=True)
            answer = next((line for line in self.process.stdout if line.startswith(RESULT)), None)
        finally:
            clock.cancel()
        if answer is None:
            code = self.process.wait()
            self.said.seek(0)
            lines = self.said.read().strip().splitlines()
            return {"error": (lines or [f"exit code {code}"])[-1], "stderr": lines[-30:]}
        found: dict[str, Any] = json.loads(answer.removeprefix(RESULT))
        if "predictions" in found:
            found["score"] = score(json.loads(file.read_text()), found.pop("predictions"))
        return found

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for each in (self.process.stdin, self.process.stdout, self.said):
            with suppress(BrokenPipeError):
                each.close()  # type: ignore[union-attr]  # all are pipes or files


def score(plan: dict[str, Any], predictions: list[Any]) -> float:
    """Our metric of the other side's predictions."""
    from reft_cli.evaluation.metrics import score_classes, score_numbers

    labels = [row["label"] for row in plan["validation"]]
    if plan["classes"]:
        return score_classes(plan["metric"], predictions, labels, classes=plan["classes"])
    return score_numbers(plan["metric"], predictions, labels)


def run_missing(args: argparse.Namespace) -> None:
    """Make every run that RESULTS does not have, one line for each as it ends."""
    from reft_cli.environment import git_state

    settings = {"rows": args.rows, "epochs": args.epochs, "set": args.set}
    had = {key_of(line) for line in lines_of(args.results) if "error" not in line}
    facts = {"settings": settings, "commit": git_state(Path(__file__).parent)}
    jobs = [
        (task, seed, side)
        for seed, task, side in itertools.product(args.seeds, args.tasks, args.sides)
        if (side, task, seed, json.dumps(settings)) not in had
    ]
    lock, left = threading.Lock(), iter(jobs)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.workers) as pool:
        plans: dict[tuple[str, int], Path] = {}

        def work() -> None:
            workers: dict[str, Worker] = {}
            while True:
                with lock:
                    task, seed, side = next(left, ("", 0, ""))
                    if side and (task, seed) not in plans:
                        plans[task, seed] = plan_of(args, task, seed, Path(folder))
                if not side:
                    break
                if side not in workers:
                    workers[side] = Worker(side, args)
                line = {"side": side, "task": task, "seed": seed} | facts | workers[side].run(plans[task, seed])
                if "error" in line:
                    workers.pop(side).close()
                with lock, args.results.open("a", encoding="utf-8") as results:
                    results.write(json.dumps(line) + "\n")
                shown = {name: line.get(name) for name in ("side", "task", "seed", "score", "seconds", "error")}
                print(json.dumps(shown), flush=True)
            for worker in workers.values():
                worker.close()

        for each in [pool.submit(work) for _ in range(min(args.workers, len(jobs)))]:
            each.result()


def lines_of(results: Path) -> list[dict[str, Any]]:
    """What RESULTS has; a line that a kill cut off is none."""
    if not results.exists():
        return []
    found = []
    for line in results.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def key_of(line: dict[str, Any]) -> tuple[str, str, int, str]:
    """Which run a line is of."""
    return line["side"], line["task"], line["seed"], json.dumps(line["settings"])


def table(lines: list[dict[str, Any]]) -> str:
    """Means and standard deviations over seeds, by settings and task; `within`: is our mean less than theirs by more
    than one of their standard deviations?"""
    text = []
    done = {key_of(line): line for line in lines if "error" not in line}.values()
    for settings in sorted({json.dumps(line["settings"]) for line in done}):
        known = json.loads(settings)
        text += [
            f"{known['rows']} rows, {known['epochs']:g} epochs{''.join(f', {each}' for each in known['set'])}",
            "",
            "| task | seeds | reft | pyreft | difference | pyreft's range | reft's range | within | seconds |",
            "|---|--:|--:|--:|--:|--:|--:|---|--:|",
        ]
        for task in TASKS:
            scores = {
                side: {each["seed"]: each for each in done if each["side"] == side and each["task"] == task
                       and json.dumps(each["settings"]) == settings}
                for side in SIDES
            }  # fmt: skip
            if all(scores.values()):
                text.append(row_of(task, scores))
        text.append("")
    return "\n".join(text)


def row_of(task: str, runs: dict[str, dict[int, dict[str, Any]]]) -> str:
    """One task's line."""
    ours, theirs = ([run["score"] for run in runs[side].values()] for side in ("reft", "pyreft"))
    seconds = [statistics.mean(run["seconds"] for run in runs[side].values()) for side in ("reft", "pyreft")]
    difference = statistics.mean(ours) - statistics.mean(theirs)
    spread = statistics.stdev(theirs) if len(theirs) > 1 else 0.0
    return (
        f"| {task} | {len(ours)}, {len(theirs)} | {summary(ours)} | {summary(theirs)} | {difference:+.3f} "
        f"| {min(theirs):.3f} to {max(theirs):.3f} | {min(ours):.3f} to {max(ours):.3f} "
        f"| {'yes' if difference >= -spread else 'no'} | {seconds[0]:.0f}, {seconds[1]:.0f} |"
    )


def summary(scores: list[float]) -> str:
    """Mean ± standard deviation."""
    spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.3f}{spread}"


def run_one(side: str, plan: dict[str, Any]) -> dict[str, Any]:
    """One run in this process: what it gives, the seconds it takes, and what it runs on."""
    started = time.perf_counter()
    found = SIDES[side](plan)
    return found | {
        "seconds": round(time.perf_counter() - started, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name of an encoder")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rows", type=int, default=2000, help="training rows, the first ones of the file")
    parser.add_argument("--epochs", type=float, default=16)
    parser.add_argument("--set", action="append", default=[], help="as `reft train --set`, for both sides")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one run")
    parser.add_argument("--peer-python", help="Python of the side pyreft")
    parser.add_argument("--peer-path", help="its packages: a folder, in place of what PYTHONPATH says")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        for file in map(str.strip, sys.stdin):
            print(RESULT + json.dumps(run_one(args.side, json.loads(Path(file).read_text()))), flush=True)
        return
    if args.model:
        run_missing(args)
    text = table(lines_of(args.results))
    if args.markdown:
        args.markdown.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
