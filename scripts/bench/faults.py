#!/usr/bin/env python3
"""What a killed and resumed run ends with, beside an uninterrupted one and beside the same run made again.

    faults.py [--spec configs/quickstart.yaml] [--steps 240] [--seed 0] [--kills 4] [--modes plain deterministic]
              [--set KEY=VALUE ...] [--folder FOLDER] [--output RESULTS.json] [--markdown TABLE.md]

For each mode `reft train` runs whole, runs whole again, and runs while it is sent SIGKILL and SIGTERM in turn at steps
drawn under the seed, each time going on with --resume. The differences are those of the last checkpoint's trained
tensors: the largest, and that as part of how far training has moved them; losses are those of metrics.jsonl. Two modes
run side by side where there are two GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from results import keep
from safetensors.torch import load_file

MODES = {"plain": [], "deterministic": ["train.deterministic=true"]}
POLL = 0.002


class Run:
    """A run folder that one process after another trains in."""

    def __init__(self, folder: Path, args: argparse.Namespace, mode: str, gpu: int | None) -> None:
        self.folder, self.environment = folder, dict(os.environ)
        if gpu is not None:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            self.environment["CUDA_VISIBLE_DEVICES"] = seen.split(",")[gpu] if seen else str(gpu)
        sets = [
            f"train.max_steps={args.steps}",
            "train.epochs=1000",
            "train.log_every=1",
            "checkpoint.every=20",
            "checkpoint.keep=1000",
        ]
        sets += ["evaluation.every=never", "parallel.processes=1", *MODES[mode], *args.sets]
        words = [part for each in sets for part in ("--set", each)]
        self.command = [sys.executable, "-m", "reft_cli", "train", str(args.spec), "-q", "-o", str(folder), *words]

    def start(self) -> subprocess.Popen[str]:
        """A process that begins, or goes on."""
        words = ["--resume"] if self.folder.exists() else []
        return subprocess.Popen(
            [*self.command, *words], env=self.environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def finish(self) -> None:
        """Let a process train to the end. RuntimeError: it failed."""
        process = self.start()
        _, said = process.communicate()
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}: {said.strip()[-400:]}")

    def suffer(self, number: signal.Signals, at: int) -> dict[str, Any]:
        """Let a process train until a step, and send it a signal there."""
        process, lines = self.start(), self.folder / "metrics.jsonl"
        while process.poll() is None and self.step(lines) < at:
            time.sleep(POLL)
        process.send_signal(number)
        process.communicate()
        return {"signal": number.name, "at": at, "reached": self.step(lines), "code": process.returncode}

    @staticmethod
    def step(lines: Path) -> int:
        """The last step that was written down."""
        text = lines.read_text() if lines.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        return int(json.loads(whole[-1])["step"]) if whole else 0

    def losses(self) -> list[float]:
        """Of every step."""
        return [json.loads(line)["loss"] for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def weights(self, which: str = "last") -> dict[str, torch.Tensor]:
        """The trained tensors of a checkpoint."""
        return load_file(self.folder / which / "interventions.safetensors")


def difference(run: Run, other: Run, *, moved: float) -> dict[str, Any]:
    """How far two runs ended from each other."""
    here, there = run.weights(), other.weights()
    far = max(float((here[name] - there[name]).abs().max()) for name in here)
    apart = max(abs(one - two) for one, two in zip(run.losses(), other.losses(), strict=True))
    files = [each.folder / "last/interventions.safetensors" for each in (run, other)]
    return {
        "bitwise": files[0].read_bytes() == files[1].read_bytes(),
        "largest": far,
        "of_what_moved": far / moved,
        "loss": apart,
    }


def measure(mode: str, gpu: int | None, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A mode's runs, one after the other."""
    whole, again, killed = (Run(folder / mode / name, args, mode, gpu) for name in ("whole", "again", "killed"))
    draw, started = random.Random(args.seed), time.perf_counter()
    try:
        whole.finish()
        again.finish()
        moments = sorted(draw.sample(range(args.steps // 10, args.steps - 10), args.kills))
        kinds = [(signal.SIGKILL, signal.SIGTERM)[index % 2] for index in range(args.kills)]
        faults = [killed.suffer(kind, at) for kind, at in zip(kinds, moments, strict=True)]
        killed.finish()
    except RuntimeError as error:
        return {"mode": mode, "error": str(error)}
    first = whole.weights("checkpoints/step_000020")  # the first that was kept
    last = whole.weights()
    moved = max(float((last[name] - first[name]).abs().max()) for name in first)
    return {
        "mode": mode,
        "faults": faults,
        "again": difference(again, whole, moved=moved),
        "resumed": difference(killed, whole, moved=moved),
        "seconds": time.perf_counter() - started,
    }


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    commit = found["commit"] or {"commit": "unknown", "dirty": False}
    lines = [
        f"{found['spec']}, {found['steps']} steps; {found['device']}; commit {commit['commit'][:8]}"
        f"{' and changes' if commit['dirty'] else ''}.",
        "",
        "| mode | beside the whole run | bitwise | largest difference | of what moved | loss |",
        "|---|---|---|--:|--:|--:|",
    ]
    for each in found["modes"]:
        if "error" in each:
            lines.append(f"| {each['mode']} | failed: {each['error'].replace('|', '/')} | | | | |")
            continue
        kills = ", ".join(f"{fault['signal']} at {fault['reached']}" for fault in each["faults"])
        for name, words in (("again", "made again"), ("resumed", f"killed and resumed: {kills}")):
            one = each[name]
            lines.append(
                f"| {each['mode']} | {words} | {'yes' if one['bitwise'] else 'no'} | {one['largest']:.1e} "
                f"| {one['of_what_moved']:.1e} | {one['loss']:.1e} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, measure, print the table and write the results."""
    root = Path(__file__).parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", type=Path, default=root / "configs/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--set", dest="sets", action="append", default=[], help="of every run, as for reft train")
    parser.add_argument("--folder", type=Path, help="where the runs are kept; a temporary one if not given")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    from reft_cli.environment import git_state

    gpus = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(max(gpus, 1)) as pool:
        places = [index % gpus if gpus > 1 else None for index in range(len(args.modes))]
        folder = args.folder or Path(temporary)
        modes = pool.map(lambda given: measure(*given, args, folder), zip(args.modes, places, strict=True))
        found = {
            "spec": str(args.spec.relative_to(root) if args.spec.is_relative_to(root) else args.spec),
            "steps": args.steps,
            "sets": args.sets,
            "device": torch.cuda.get_device_name() if gpus else "cpu",
            "torch": torch.__version__,
            "commit": git_state(root),
            "modes": list(modes),
        }
    keep(found, table(found), output=args.output, markdown=args.markdown)
    print(table(found), end="")


if __name__ == "__main__":
    main()
