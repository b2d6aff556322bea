#!/usr/bin/env python3
"""Seconds a training step of our loop on one process and on several at one global batch, one GPU a process.

    parallel.py --shapes 1b 8b [--processes 1 2] [--rows 64] [--mix commonsense|alpaca] [--positions f7+l7]
                [--layers all|3;9;18;24] [--rank 8] [--budget TOKENS] [--steps 24] [--warmup 10] [--plain] [--shard]
                [--checkpointing] [--timeout SECONDS] [--output RESULTS.json] [--markdown TABLE.md]

Each row is a run of its own: the processes that `reft train` would start, on random weights in the named shape and the
same drawn rows. Medians of the first process, by the device's clock where there is one; all processes wait for each
other in every step. `gradients` is the all-reduce of everything that trains: by itself, median of as many calls, and
within the steps, where it waits for the slowest process too. `ratio` compares with the first number of processes.

With --shard the base of several processes is spread over them (FSDP2), made on `meta` and filled where it lies; that of
one is whole. A run that fails, for want of memory say, is a row of the table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from results import keep
from train_sides import MIXES, SHAPES, Plan, llama_config, random_llama

ASKED = ("shape", "mix", "positions", "layers", "rank", "budget", "rows", "steps", "warmup")


def measure(plan: Plan, args: argparse.Namespace) -> dict[str, Any]:
    """One process's share of a run."""
    from ours import stepping, trainer_of

    from reft_cli.parallel.collective import joined, size
    from reft_cli.training import loop

    with joined(device=plan.device):
        started = time.perf_counter()
        model = sharded_llama(plan) if args.shard and size() > 1 else random_llama(plan)
        made = time.perf_counter() - started
        held = torch.cuda.memory_allocated() if plan.device == "cuda" else 0
        trainer = trainer_of(model, plan, rows=args.rows, compiled=not args.plain, checkpointing=args.checkpointing)
        clock, reductions = Clock(plan.device), Reductions(plan.device)
        inner, loop.add_up = loop.add_up, reductions.around(loop.add_up)
        with stepping(trainer) as step:
            warmed = time.perf_counter()
            for _ in range(args.warmup):
                loss, _ = step()
            loss.item()
            warmed = time.perf_counter() - warmed
            reductions.seconds()
            if plan.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            tokens = 0
            with clock.running():
                for _ in range(args.steps):
                    loss, batch = step()
                    tokens += batch.examples.token_count
                    clock.mark()
            times, within = clock.seconds(), reductions.seconds()
        loop.add_up = inner
        alone = reduction_alone(list(trainer.parameters.values()), plan.device, args.steps)
        return {
            "processes": size(),
            "seconds": round(statistics.median(times), 5),
            "fastest": round(min(times), 5),
            "slowest": round(max(times), 5),
            "tokens_a_second": round(tokens / args.steps / statistics.median(times)),
            "passes": len(batch.passes),
            "gradients_alone": round(statistics.median(alone), 6),
            "gradients_within": round(statistics.median(within), 6),
            "gradients_bytes": 4 * sum(each.numel() for each in trainer.parameters.values()),
            "recorded": trainer.settings.recorded,
            "compiled": trainer.settings.compiled,
            "sharded": trainer.model.is_sharded,
            "base_gib": round(held / 2**30, 2),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if plan.device == "cuda" else None,
            "made": round(made, 1),
            "warmed": round(warmed, 1),
            "loss": round(float(loss), 5),
        }


class Clock:
    """Seconds between marks, by the device's clock; the host waits for nothing until it is asked."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        self.marks: list[Any] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, time is taken."""
        self.mark()
        yield

    def mark(self) -> None:
        """The end of a span and the beginning of the next."""
        if not self.gpu:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> list[float]:
        """Of each span; the marks are forgotten."""
        if self.gpu:
            torch.cuda.synchronize()
            found = [one.elapsed_time(two) / 1e3 for one, two in zip(self.marks, self.marks[1:], strict=False)]
        else:
            found = [two - one for one, two in zip(self.marks, self.marks[1:], strict=False)]
        self.marks = []
        return found


class Reductions:
    """The time of every all-reduce of gradients."""

    def __init__(self, device: str) -> None:
        self.clock = Clock(device)

    def around(self, inner: Callable[..., None]) -> Callable[..., None]:
        """The function, timed."""

        def timed(tensors: list[torch.Tensor]) -> None:
            self.clock.mark()
            inner(tensors)
            self.clock.mark()

        return timed

    def seconds(self) -> list[float]:
        """Of each call since the last question."""
        return self.clock.seconds()[::2]


def reduction_alone(parameters: list[torch.nn.Parameter], device: str, calls: int) -> list[float]:
    """Seconds of adding up gradients of these parameters, with nothing else to do."""
    from reft_cli.parallel.collective import add_up, largest

    gradients, clock = [torch.zeros_like(each) for each in parameters], Clock(device)
    add_up(gradients)
    largest(0)
    with clock.running():
        for _ in range(calls):
            add_up(gradients)
            clock.mark()
    return clock.seconds()


def sharded_llama(plan: Plan) -> Any:
    """The shape with random weights, of which no process ever has more than its part and one block."""
    from transformers import LlamaForCausalLM

    from reft_cli.models.sharding import shard_blocks

    config = llama_config(plan.shape)
    config.dtype = torch.bfloat16 if plan.device == "cuda" else torch.float32
    torch.set_default_dtype(config.dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    device = torch.device(plan.device, torch.cuda.current_device()) if plan.device == "cuda" else torch.device("cpu")
    shard_blocks(model.requires_grad_(False), device)
    model.to_empty(device=device)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        here = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        here.data.fill_(1.0) if here.ndim == 1 else here.data.normal_(0.0, 0.02)
    return model


def run(shape: str, processes: int, args: argparse.Namespace) -> dict[str, Any]:
    """A row: the processes of one run; {error} if they fail."""
    command = [sys.executable, __file__, "--of", str(processes), "--shapes", shape]
    for name in (*ASKED[1:], "timeout"):
        command += [f"--{name}", str(getattr(args, name))]
    command += [f"--{name}" for name in ("plain", "shard", "checkpointing") if getattr(args, name)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return {"processes": processes, "error": f"more than {args.timeout:.0f} s"}
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found
    said = [line for line in done.stderr.strip().splitlines() if line.strip()]
    errors = [line for line in said if "Error" in line]
    return {
        "processes": processes,
        "error": (errors or said or [f"exit code {done.returncode}"])[-1],
        "stderr": said[-30:],
    }


def launch(args: argparse.Namespace) -> None:
    """Start a row's processes as `reft train` does; the first one's line goes through."""
    from reft_cli.parallel.launch import run_command

    here = str(Path(__file__).parent)  # which Python does not add by itself for processes that reft starts
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    outcome = run_command([sys.executable, __file__, "--here", *sys.argv[1:]], args.of)
    if outcome.code:
        print(outcome.said or outcome.lost or "", file=sys.stderr)
    sys.exit(outcome.code)


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    commit = found["commit"] or {"commit": "unknown", "dirty": False}
    lines = [
        f"{found['mix']} rows, {found['rows']} a step, {found['positions']} tied, rank {found['rank']}, layers "
        f"{found['layers']}; {found['device']}; {found['steps']} steps after {found['warmup']}; commit "
        f"{commit['commit'][:8]}{' and changes' if commit['dirty'] else ''}.",
        "",
        "| shape | processes | seconds a step | tokens/s | ratio | gradients alone, within (ms) | peak GiB | loss |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for shape, rows in found["shapes"].items():
        first = next((row for row in rows if "error" not in row), None)
        for row in rows:
            if "error" in row:
                lines.append(
                    f"| {shape} | {row['processes']} | failed: {row['error'].replace('|', '/')[:160]} | | | | | |"
                )
                continue
            ratio = f"{row['tokens_a_second'] / first['tokens_a_second']:.2f}" if first else "–"
            memory = "–" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
            alone, within = 1e3 * row["gradients_alone"], 1e3 * row["gradients_within"]
            lines.append(
                f"| {shape}{', sharded' if row['sharded'] else ''} | {row['processes']} | {row['seconds']:.4f} "
                f"| {row['tokens_a_second']:,} | {ratio} | {alone:.2f}, {within:.2f} | {memory} | {row['loss']} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rows", type=int, default=64, help="of a global batch")
    parser.add_argument("--mix", choices=MIXES, default="commonsense")
    parser.add_argument("--positions", default="f7+l7")
    parser.add_argument("--layers", default="all", help="all, or numbers with ; between them")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--budget", type=int, default=16_384, help="tokens in one pass")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--plain", action="store_true", help="do not compile")
    parser.add_argument("--shard", action="store_true", help="spread the base over the processes")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one row")
    parser.add_argument("--of", type=int, help=argparse.SUPPRESS)  # start so many processes of one row
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # be one of them
    parser.add_argument("--output", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.here:  # comes with --of
        plan = Plan(args.shapes[0], args.mix, device, args.positions, args.layers, args.rank, args.budget)
        found = measure(plan, args)
        print(json.dumps(found), flush=True)
        os._exit(0)
    if args.of:
        launch(args)
    from reft_cli.environment import git_state

    results: dict[str, Any] = {name: getattr(args, name) for name in ASKED[1:]} | {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "commit": git_state(Path(__file__).parent),
        "shapes": {},
    }
    for shape in args.shapes:
        results["shapes"][shape] = []
        for processes in args.processes:
            results["shapes"][shape].append(run(shape, processes, args))
            print(json.dumps({"shape": shape} | results["shapes"][shape][-1]), file=sys.stderr, flush=True)
            keep(results, table(results), output=args.output, markdown=args.markdown)
    print(table(results), end="")


if __name__ == "__main__":
    main()
