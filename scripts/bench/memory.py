#!/usr/bin/env python3
"""Memory of loading a base and of training on it, in each form it can have, beside what was predicted.

    memory.py --shape 8b [--folder FOLDER] [--forms whole float8 nf4 int8]
              [--cases all:f7+l7:4096 '3;9;18;24:f5+l5:16384:again'] [--mix commonsense|alpaca] [--rows 32] [--rank 8]
              [--steps 6] [--timeout SECONDS] [--output RESULTS.json] [--markdown TABLE.md]

Random weights of the shape are written once as a model folder, or taken from FOLDER if it is there; for every case the
form is loaded from it in a process of its own, as `reft train` does. `loading` is the device's peak and what is left
of it, and the process's own memory at its highest: anonymous pages, so without what of the file lies in the page cache.

A case is layers:positions:tokens of a pass, with `:again` for gradient checkpointing. Predicted is what `reft check
--memory` adds up from one short row, checked the peak of its trial pass, trained the peak of the loop's own steps run
as they come, and chosen that of steps compiled and recorded as `reft train` would choose, with the seconds of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from results import keep
from train_sides import MIXES, SHAPES, Plan, random_llama

FORMS = {"whole": None, "float8": "float8", "nf4": "nf4", "int8": "int8"}
GIB = 2**30
ASKED = ("shape", "mix", "rows", "rank", "steps")


@dataclass(frozen=True)
class Case:
    """What is trained, and in what passes."""

    layers: str
    positions: str
    tokens: int
    checkpointing: bool

    @classmethod
    def of(cls, text: str) -> Case:
        """layers:positions:tokens[:again]."""
        layers, positions, tokens, *rest = text.split(":")
        return cls(layers, positions, int(tokens), rest == ["again"])


@contextmanager
def host_peak() -> Iterator[list[int]]:
    """Inside, the most anonymous memory that this process has had beyond what it began with, in bytes."""
    start, found, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            found[0] = max(found[0], anonymous() - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def anonymous() -> int:
    """Bytes of anonymous memory of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon")


def measure(args: argparse.Namespace, form: str) -> dict[str, Any]:
    """One form of the base, in this process."""
    from reft_cli.models.loading import BaseSource, load_causal_lm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.zeros(1, device=device)
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    with host_peak() as host:
        base = load_causal_lm(BaseSource(str(args.folder), device=device, quantization=FORMS[form]))
    found: dict[str, Any] = {
        "form": form,
        "file_gib": sum(each.stat().st_size for each in args.folder.glob("*.safetensors")) / GIB,
        "load_seconds": time.perf_counter() - started,
        "load_host_gib": host[0] / GIB,
        "load_peak_gib": torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None,
        "base_gib": torch.cuda.memory_allocated() / GIB if device == "cuda" else None,
        "cases": [],
    }
    for text in args.cases:  # one, when this is a process of its own
        case = Case.of(text)
        plan = Plan(args.shape, args.mix, device, case.positions, case.layers, args.rank, case.tokens)
        found["cases"].append(asdict(case) | trained(base.model, plan, case, args))
    return found


def trained(model: Any, plan: Plan, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Predicted and measured memory of a case, and the seconds of its steps."""
    from ours import examples_of, intervened_of

    from reft_cli.positions import Positions
    from reft_cli.runs.estimate import estimate
    from reft_cli.tasks.objectives import TASKS

    rows = examples_of(plan)[: args.rows]
    found: dict[str, Any] = {}
    for name, compiled in (("trained", False), ("chosen", True)):
        expected = estimate(
            intervened_of(model, plan), TASKS["causal_lm"], examples=rows,
            groups=Positions.parse(plan.positions).groups(tied=True), layout="packed", pad_token_id=0, steps=1,
            global_batch_size=args.rows, micro_batch_size=None, token_budget=plan.budget,
            checkpointing=case.checkpointing, compiled=compiled, recorded=compiled and not case.checkpointing,
            shared=False,
        )  # fmt: skip
        measured = None if expected.measured_bytes is None else expected.measured_bytes / GIB
        found |= {"pass_tokens": expected.pass_tokens, f"{name}_predicted_gib": expected.predicted_bytes / GIB}
        found |= {} if compiled else {"checked_gib": measured}
        tried = replace(plan, budget=expected.pass_tokens)  # what a run takes after it tried that pass
        try:
            found |= {f"{name}_{key}": value for key, value in steps(model, tried, case, args, compiled).items()}
        except RuntimeError as error:
            found |= {f"{name}_gib": None, f"{name}_error": str(error).splitlines()[0]}
    return found


def steps(model: Any, plan: Plan, case: Case, args: argparse.Namespace, compiled: bool) -> dict[str, Any]:
    """Peak memory and seconds of some steps of the loop; the last of them are timed."""
    from ours import examples_of, stepping, trainer_of

    gpu = plan.device == "cuda"
    if gpu:
        torch.cuda.empty_cache()
    rows = examples_of(plan)[: args.rows]
    trainer = trainer_of(
        model, plan, rows=args.rows, examples=rows, compiled=compiled, recorded=compiled, cached=False,
        checkpointing=case.checkpointing,
    )  # fmt: skip
    times, held = [], 0
    with stepping(trainer) as step:
        for index in range(args.steps):
            if gpu and index == args.steps // 2:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                held = torch.cuda.memory_reserved()  # live tensors, and what CUDA graphs keep
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            step()[0].item()
            times.append(time.perf_counter() - started)
    trainer.model.checkpoint_activations(False)
    return {
        "gib": max(held, torch.cuda.max_memory_allocated()) / GIB if gpu else None,
        "seconds": statistics.median(times[args.steps // 2 :]),
    }


def written(shape: str, folder: Path) -> None:
    """A model folder of the shape with random weights, unless it is there."""
    if (folder / "config.json").is_file():
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_llama(Plan(shape, "alpaca", device, "f1+l1", "all", 1, 1))
    model.save_pretrained(folder, max_shard_size="2GB")


def run(form: str, args: argparse.Namespace) -> dict[str, Any]:
    """A form, with the loading of its first case and the cases of all; {error} if one fails."""
    found: dict[str, Any] = {}
    for case in args.cases:
        one = run_case(form, case, args)
        if "error" in one:
            return one
        found = found or one | {"cases": []}
        found["cases"] += one["cases"]
    return found


def run_case(form: str, case: str, args: argparse.Namespace) -> dict[str, Any]:
    """A form and a case in a process of their own; {error} if it fails."""
    command = [sys.executable, __file__, "--form", form, "--folder", str(args.folder), "--cases", case]
    for name in ASKED:
        command += [f"--{name}", str(getattr(args, name))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return {"form": form, "error": f"{case}: more than {args.timeout:.0f} s"}
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found
    said = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return {"form": form, "error": f"{case}: {(said or [done.returncode])[-1]}", "stderr": said[-30:]}


def shown(number: float | None, digits: int = 2) -> str:
    """A number of a table; a dash if there is none."""
    return "–" if number is None else f"{number:.{digits}f}"


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    commit = found["commit"] or {"commit": "unknown", "dirty": False}
    lines = [
        f"{found['shape']} shape, {found['rows']} {found['mix']} rows a step, rank {found['rank']}; {found['device']}; "
        f"commit {commit['commit'][:8]}{' and changes' if commit['dirty'] else ''}. Memory in GiB.",
        "",
        "| base | file | loading: peak, left, host, seconds | layers, positions, tokens a pass | predicted | checked "
        "| trained | seconds | predicted | chosen | seconds |",
        "|---|--:|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for each in found["forms"]:
        if "error" in each:
            lines.append(f"| {each['form']} | failed: {each['error'].replace('|', '/')[:200]} | | | | | | | | | |")
            continue
        loading = (
            f"{shown(each['load_peak_gib'])}, {shown(each['base_gib'])}, {shown(each['load_host_gib'])}, "
            f"{each['load_seconds']:.1f}"
        )
        for case in each["cases"]:
            again = ", checkpointed" if case["checkpointing"] else ""
            lines.append(
                f"| {each['form']} | {each['file_gib']:.2f} | {loading} | {case['layers']}, {case['positions']}, "
                f"{case['pass_tokens']:,}{again} | {shown(case['trained_predicted_gib'])} "
                f"| {shown(case['checked_gib'])} | {shown(case['trained_gib'])} "
                f"| {shown(case.get('trained_seconds'), 4)} | {shown(case['chosen_predicted_gib'])} "
                f"| {shown(case['chosen_gib'])} | {shown(case.get('chosen_seconds'), 4)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--folder", type=Path, help="the model folder; a temporary one if not given")
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS))
    parser.add_argument("--cases", nargs="*", default=["all:f7+l7:4096"])
    parser.add_argument("--mix", choices=MIXES, default="alpaca")
    parser.add_argument("--rows", type=int, default=32, help="of a global batch")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="of each kind; the second half is measured")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one case")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)  # measure it in this process
    parser.add_argument("--output", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    if args.form:
        print(json.dumps(measure(args, args.form)), flush=True)
        os._exit(0)  # contexts that the process held to its end are not to be left half torn down
    from reft_cli.environment import git_state

    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary) / args.shape
        written(args.shape, args.folder)
        torch.cuda.empty_cache()
        found = {name: getattr(args, name) for name in ASKED} | {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "commit": git_state(Path(__file__).parent),
            "forms": [],
        }
        for form in args.forms:
            found["forms"].append(run(form, args))
            print(json.dumps(found["forms"][-1]), file=sys.stderr, flush=True)
            keep(found, table(found), output=args.output, markdown=args.markdown)
    print(table(found), end="")


if __name__ == "__main__":
    main()
