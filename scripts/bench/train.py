#!/usr/bin/env python3
"""Seconds a training step and peak memory of ours and its peers, in turn on one machine, each in its own environment.

    train.py --shape 1b [--mix commonsense|alpaca] [--positions f7+l7] [--layers all|3;9;18;24] [--rank 8]
             [--sides reft reft-plain reft-uncached reft-float8 pyreft adapters lora frozen] [--steps 20] [--warmup 16]
             [--budget TOKENS] [--profile FOLDER] [--timeout SECONDS]
             [--peer-python PYTHON | --peer-path FOLDER] [--adapters-python …] [--adapters-path …] [--lora-python …]
             [--output RESULTS.json] [--markdown TABLE.md]

Every side runs in a process of its own on the same random-weight Llama and the same drawn rows, 32 a step, with one set
of weights for first and last positions. A side that fails is a line of the table and ends nothing.

    reft      our loop's own step, compiled, small shapes recorded as CUDA graphs, frozen blocks kept
    reft-plain, reft-uncached, reft-float8   the same not compiled, with no frozen blocks kept, with the base in float8
    pyreft    LoReFT by its model and locations
    adapters  LoReFT by AdapterHub's model; its last positions are those of the whole row, answer included
    lora      PEFT's LoRA of the same rank on q and v of the same layers
    frozen    the model alone forward, and backward to its embeddings, padded and with labels as the peers pass them

Medians are over `--steps` steps after `--warmup`, by the device's clock where there is one: steps follow each other and
the host waits for none, as in training; `waited` is the median of as many steps that the host waits for. Memory is the
device's peak in those steps, what CUDA graphs hold included, and the process's own since its start. The floor is the
arithmetic alone at `--flops` a second: for each real token 2 operations for each weight of every block, and 2 more in
blocks from the lowest edited one up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from results import keep
from train_sides import BATCHES, MIXES, ROWS, SHAPES, SIDES, Plan, draw

PEERS = {"pyreft": "peer", "adapters": "adapters", "lora": "lora"}  # sides that may have an environment: their flags
SHOWN = ("torch", "transformers", "reft", "pyreft", "pyvene", "adapters", "peft")  # versions in the table


def measure(plan: Plan, side: str, *, steps: int, warmup: int, traces: Path | None) -> dict[str, Any]:
    """One side, in this process."""
    batches = draw(plan.mix, SHAPES[plan.shape][5], BATCHES)
    run, gpu = SIDES[side](plan), plan.device == "cuda"
    numbers = itertools.count()

    def step() -> torch.Tensor:
        return run(batches[next(numbers) % len(batches)])

    first = waited(step)
    for _ in range(warmup - 1):
        step()
    held = 0
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved()  # live tensors, and what CUDA graphs keep
        torch.cuda.reset_peak_memory_stats()
    times = by_device(step, steps) if gpu else [waited(step) for _ in range(steps)]
    with_waits = [waited(step) for _ in range(steps)]
    loss = float(step())
    return {
        "side": side,
        "seconds": round(statistics.median(times), 5),
        "fastest": round(min(times), 5),
        "slowest": round(max(times), 5),
        "waited": round(statistics.median(with_waits), 5),
        "first": round(first, 2),
        "peak_gib": round(max(held, torch.cuda.max_memory_allocated()) / 2**30, 2) if gpu else None,
        "host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "loss": round(loss, 4),
        "busy": profiled(step, traces / f"{plan.shape}_{plan.mix}_{side}.txt") if gpu and traces else None,
        "versions": versions(),
    }


def waited(step: Callable[[], torch.Tensor]) -> float:
    """Seconds of a step, by the host's clock until the loss is there."""
    started = time.perf_counter()
    float(step())
    return time.perf_counter() - started


def by_device(step: Callable[[], torch.Tensor], steps: int) -> list[float]:
    """Seconds of each of some steps, by the device's clock."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(marks)]


def profiled(step: Callable[[], torch.Tensor], file: Path, steps: int = 4) -> float:
    """Share of the time in which the GPU works; a table of its kernels goes to a file."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    spans = sorted(
        (each.time_range.start, each.time_range.end)
        for each in seen.events()
        if each.device_type == torch.autograd.DeviceType.CUDA and each.name != "Command Buffer Full"
    )
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90))
    return round(busy / (reached - spans[0][0]), 4)


def versions() -> dict[str, str]:
    """Of Python and every package that this process has imported."""
    owners = packages_distributions()
    used = {owner for name in list(sys.modules) for owner in owners.get(name.partition(".")[0], ())}
    return {"python": sys.version.split()[0]} | {name: version(name) for name in sorted(used)}


def tokens_of(plan: Plan) -> float:
    """Real tokens of a step, in the mean."""
    batches = draw(plan.mix, SHAPES[plan.shape][5], BATCHES)
    return statistics.mean(sum(len(tokens) for tokens, _ in rows) for rows in batches)


def floor(plan: Plan, flops: float) -> float:
    """Seconds that the arithmetic alone takes; the docstring above says what is counted."""
    hidden, inner, layers, heads, kv_heads, _, _ = SHAPES[plan.shape]
    block = 2 * hidden * hidden + 2 * hidden * hidden * kv_heads // heads + 3 * hidden * inner
    return 2 * block * (2 * layers - min(plan.chosen)) * tokens_of(plan) / flops


def run_side(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """One side in a process of its own; {side, error, stderr} if it fails."""
    flags = PEERS.get(side, "")
    python = getattr(args, f"{flags}_python", None) or sys.executable
    path = getattr(args, f"{flags}_path", None)
    environment = dict(os.environ) | ({"PYTHONPATH": path} if path else {})
    command = [python, __file__, "--side", side]
    for name in ("shape", "mix", "positions", "layers", "rank", "budget", "steps", "warmup"):
        command += [f"--{name}", str(getattr(args, name))]
    if args.profile and side.startswith("reft"):
        command += ["--profile", str(args.profile)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=args.timeout
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"side": side, "error": str(error).replace(str(command), side), "stderr": []}
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return result
    said = done.stderr.strip().splitlines()
    return {"side": side, "error": (said or [f"exit code {done.returncode}"])[-1], "stderr": said[-30:]}


def run_sides(args: argparse.Namespace) -> dict[str, Any]:
    """Every side, one after the other, and what they were measured on."""
    from reft_cli.environment import git_state

    gpu = torch.cuda.is_available()
    plan = plan_of(args)
    names = ("shape", "mix", "positions", "layers", "rank", "budget", "steps", "warmup")
    asked = {name: getattr(args, name) for name in names}
    found: dict[str, Any] = asked | {
        "rows": ROWS,
        "tokens": tokens_of(plan),
        "device": torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads",
        "floor": round(floor(plan, args.flops), 5) if gpu else None,
        "commit": git_state(Path(__file__).parent),
        "sides": [],
    }
    for side in args.sides:
        found["sides"].append(run_side(side, args))
        print(json.dumps(found["sides"][-1] | {"versions": None}), file=sys.stderr, flush=True)
        keep(found, table(found), output=args.output, markdown=args.markdown)
    return found


def table(found: dict[str, Any]) -> str:
    """The results as Markdown; `times` is how many of our steps one of that side takes."""
    ours = next((each["seconds"] for each in found["sides"] if each["side"] == "reft" and "error" not in each), None)
    commit = found["commit"] or {"commit": "unknown", "dirty": False}
    lines = [
        f"{found['shape']} shape, {found['mix']} rows ({found['rows']} a step, {found['tokens']:,.0f} tokens), "
        f"{found['positions']} tied, rank {found['rank']}, layers {found['layers']}; {found['device']}; "
        f"{found['steps']} steps after {found['warmup']}; commit {commit['commit'][:8]}"
        f"{' and changes' if commit['dirty'] else ''}.",
        "",
        "| side | seconds a step | times | tokens/s | peak GiB | process GiB | loss | versions |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    if found["floor"]:
        times = f"{found['floor'] / ours:.2f}" if ours else "–"
        lines.append(
            f"| arithmetic floor | {found['floor']:.4f} | {times} | {found['tokens'] / found['floor']:,.0f} | | | | |"
        )
    for each in found["sides"]:
        if "error" in each:
            text = each["error"].replace("|", "/")
            lines.append(f"| {each['side']} | failed | | | | | | {text} |")
            continue
        times = f"{each['seconds'] / ours:.2f}" if ours else "–"
        memory = "–" if each["peak_gib"] is None else f"{each['peak_gib']:.1f}"
        shown = ", ".join(f"{name} {each['versions'][name]}" for name in SHOWN if name in each["versions"])
        lines.append(
            f"| {each['side']} | {each['seconds']:.4f} | {times} | {found['tokens'] / each['seconds']:,.0f} | {memory} "
            f"| {each['host_gib']:.1f} | {each['loss']} | {shown} |"
        )
    return "\n".join(lines) + "\n"


def plan_of(args: argparse.Namespace) -> Plan:
    """The flags that every side reads."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Plan(args.shape, args.mix, device, args.positions, args.layers, args.rank, args.budget)


def main() -> None:
    """Parse, measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--mix", choices=MIXES, default="commonsense")
    parser.add_argument("--positions", default="f7+l7")
    parser.add_argument("--layers", default="all", help="all, or numbers with ; between them")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=16)
    parser.add_argument("--budget", type=int, default=16_384, help="tokens in one of our passes")
    parser.add_argument("--profile", type=Path, help="folder for a table of what the GPU does in our steps")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one side")
    parser.add_argument("--flops", type=float, default=790e12, help="operations a second of the device, measured")
    for side, flags in PEERS.items():
        parser.add_argument(f"--{flags}-python", help=f"Python of the side {side}")
        parser.add_argument(f"--{flags}-path", help="its packages: a folder, in place of what PYTHONPATH says")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    if args.side:
        found = measure(plan_of(args), args.side, steps=args.steps, warmup=args.warmup, traces=args.profile)
        print(json.dumps(found), flush=True)
        os._exit(0)  # contexts that the process held to its end are not to be left half torn down
    print(table(run_sides(args)), end="")


if __name__ == "__main__":
    main()
