#!/usr/bin/env python3
"""Generated tokens a second: ours, pyreft and the base model on three paths, in turn on one machine.

    generate.py --shape 1b [--sides reft base all red ... pyreft] [--batches 1 8 32 128]
                [--answers 16 128] [--ragged 1000] [--mixed 64] [--peer-python PYTHON] [--peer-path FOLDER]
                [--timeout 240] [--gpus 1] [--output RESULTS.json]

Every side runs in a process of its own on the same random-weight Llama: LoReFT at f7+l7 tied, rank 8, all layers, ends
of answers switched off so that all sides decode the same number of tokens. `reft` and `base` are our own slots with and
without the intervention, `-compiled` those with compiled blocks; `all` has LoReFT at every token of block_output, `red`
RED at every token of mlp_output, which is merged. `eager` and `static` are transformers' generate with
its dynamic cache, and with a static cache and its compiled step. A fixed workload is a batch of prompts of 128 tokens;
the best of `--repeats` after a warm-up of the same shape counts, prompts included. `ragged` are prompts of 20 to 400
tokens, the last number of `--answers` new ones each, in --ragged-batch slots; transformers and pyreft take the first
`--peer-rows` of them in batches of 4 and 32, left-padded. `mixed` is one batch in which every row has its own
checkpoint or all have the same one. pyreft runs under --peer-python, or with --peer-path first on its path. With
--gpus 2 two sides run at a time, each on a GPU of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from results import keep
from train_sides import SHAPES, Plan, random_llama

FIRST, LAST, RANK = 7, 7, 8
PROMPT, RAGGED = 128, (20, 400)
Prompts = list[list[int]]
Decode = Callable[[Prompts, int, int], int]  # prompts, new tokens, batch size -> tokens that came


def draw(count: int, length: tuple[int, int], vocabulary: int) -> Prompts:
    """The same prompts on every side."""
    chance = random.Random(count)
    return [[chance.randrange(10, vocabulary) for _ in range(chance.randint(*length))] for _ in range(count)]


def endless(shape: str, device: str) -> Any:
    """The bench's model of a shape, whose answers have no end."""
    plan = Plan(shape, "commonsense", device, f"f{FIRST}+l{LAST}", "all", RANK, 0)
    model = random_llama(plan).eval()
    model.generation_config.eos_token_id = None
    return model


def members_of(model: Any, count: int, *, kind: str = "reft") -> list[Any]:
    """As many different checkpoints of a kind, folded."""
    from reft_cli.models.build import build_intervened
    from reft_cli.models.loading import BaseModel, shape_hash
    from reft_cli.models.stacked import Member
    from reft_cli.positions import Positions

    positions = Positions.parse(f"f{FIRST}+l{LAST}" if kind == "reft" else "all")
    method, component = ("red", "mlp_output") if kind == "red" else ("loreft", "block_output")
    groups = positions.groups(tied=True)

    def member(seed: int) -> Member:
        base = BaseModel(model, "bench", None, shape_hash(model))
        return Member.of(build_intervened(
            base, method=method, layers="all", component=component, positions=positions, tied=True,
            rank=None if method == "red" else RANK, init="paper", dropout=0.0, dropout_on="delta", seed=seed,
        ).eval(), groups)  # fmt: skip

    return [member(seed) for seed in range(count)]


class NoText:
    """A tokenizer without texts and without an end: every answer has all its tokens."""

    eos_token_id = None
    pad_token_id = 0

    def decode(self, tokens: Sequence[int], **_: object) -> str:
        """Nothing."""
        return ""


def ours(
    shape: str, device: str, *, members: int, kind: str = "reft", compiled: bool = False
) -> tuple[Decode, Callable[[list[int]], None]]:
    """Our slots; the second function says which member answers each prompt (0: the base), in turn."""
    from reft_cli.generation.decode import Decoder
    from reft_cli.generation.settings import Decoding, Request
    from reft_cli.models.stacked import Stack

    model = endless(shape, device)
    stack = Stack(model, members_of(model, members, kind=kind))
    decoder = Decoder(model, stack, tokenizer=NoText())  # type: ignore[arg-type]
    turns = [1 if members else 0]

    def decode(prompts: Prompts, new: int, batch: int) -> int:
        requests = [Request(prompt, turns[index % len(turns)]) for index, prompt in enumerate(prompts)]
        settings = Decoding(max_new_tokens=new, compile="on" if compiled else "off")
        assert decoder.why_not_slots(settings) is None
        return sum(answer.tokens for _, answer in decoder.answers(requests, decoding=settings, batch_size=batch))

    return decode, lambda wanted: turns.__setitem__(slice(None), wanted)


def batches(prompts: Prompts, size: int, device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Left-padded ids and masks."""
    for start in range(0, len(prompts), size):
        rows = prompts[start : start + size]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
        yield ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)


def transformers_generate(shape: str, device: str, *, static: bool) -> Decode:
    """The base model through transformers' generate."""
    model = endless(shape, device)
    options = {"cache_implementation": "static"} if static else {}

    @torch.inference_mode()
    def decode(prompts: Prompts, new: int, batch: int) -> int:
        made = 0
        for ids, mask in batches(prompts, batch, device):
            found = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **options
            )
            made += (found.shape[1] - ids.shape[1]) * len(ids)
        return made

    return decode


def pyreft_generate(shape: str, device: str) -> Decode:
    """pyreft's generate with the interventions on the prompt, left-padded as its examples evaluate."""
    import pyreft

    model = endless(shape, device)
    layers, hidden = SHAPES[shape][2], SHAPES[shape][0]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": RANK,
            "intervention": pyreft.LoreftIntervention(embed_dim=hidden, low_rank_dimension=RANK, dtype=dtype),
        }
        for layer in range(layers)
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations), set_device=False)
    reft.set_device(device)
    reft.eval()

    @torch.no_grad()
    def decode(prompts: Prompts, new: int, batch: int) -> int:
        made = start = 0
        for ids, mask in batches(prompts, batch, device):
            locations = [
                pyreft.get_intervention_locations(
                    last_position=len(row), first_n=FIRST, last_n=LAST, num_interventions=layers, share_weights=True
                )
                for row in prompts[start : start + batch]
            ]
            start += batch
            padding = (mask == 0).sum(1)[None, :, None].cpu()
            units = (torch.tensor(locations).permute(1, 0, 2) + padding).tolist()
            _, found = reft.generate(
                {"input_ids": ids, "attention_mask": mask},
                unit_locations={"sources->base": (None, units)},
                intervene_on_prompt=True,
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
            made += (found.shape[1] - ids.shape[1]) * len(ids)
        return made

    return decode


OURS = ("reft", "base", "all", "red")
SIDES = (*OURS, *(f"{name}-compiled" for name in OURS), "eager", "static", "pyreft")


def side(name: str, shape: str, device: str) -> Decode:
    """A side by its name."""
    kind, _, compiled = name.partition("-")
    if kind in OURS:
        return ours(shape, device, members=int(kind != "base"), kind=kind, compiled=bool(compiled))[0]
    if name == "pyreft":
        return pyreft_generate(shape, device)
    return transformers_generate(shape, device, static=name == "static")


def timed(decode: Callable[[], int], device: str) -> tuple[int, float]:
    """(tokens, seconds) of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    made = decode()
    if device == "cuda":
        torch.cuda.synchronize()
    return made, time.perf_counter() - started


def rate(decode: Callable[[], int], device: str, *, repeats: int, warm: bool = True) -> dict[str, Any]:
    """Tokens a second of the fastest of some calls, and of each."""
    if warm:
        decode()
    found = [timed(decode, device) for _ in range(repeats)]
    rates = [round(made / seconds, 1) for made, seconds in found]
    return {"rate": max(rates), "rates": rates}


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All workloads of one side, in this process, each told as it is done."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vocabulary = SHAPES[args.shape][5]
    if args.side == "mixed":
        yield from measure_mixed(args, device, vocabulary)
        return
    decode, peer = side(args.side, args.shape, device), args.side in ("pyreft", "eager", "static")
    for batch in args.batches:
        prompts = draw(batch, (PROMPT, PROMPT), vocabulary)
        for new in args.answers:
            started = time.perf_counter()
            decode(prompts, new, batch)
            first = round(time.perf_counter() - started, 2)
            found = rate(lambda p=prompts, n=new, b=batch: decode(p, n, b), device, repeats=args.repeats, warm=False)
            yield {"work": f"batch {batch}, {new} new", **found, "first_seconds": first}
    if not args.ragged or args.side == "static":  # every width would be compiled anew
        return
    prompts = draw(args.ragged, RAGGED, vocabulary)
    rows, sizes = (prompts[: args.peer_rows], (4, 32)) if peer else (prompts, (args.ragged_batch,))
    for size in sizes:
        if not peer:
            decode(prompts[: 2 * size], args.answers[-1], size)
        found = rate(lambda s=size: decode(rows, args.answers[-1], s), device, repeats=1, warm=False)
        yield {"work": f"ragged in {size}", **found, "rows": len(rows)}


def measure_mixed(args: argparse.Namespace, device: str, vocabulary: int) -> Iterator[dict[str, Any]]:
    """A batch in which every row has a checkpoint of its own, beside the same batch with one for all."""
    decode, take_turns = ours(args.shape, device, members=args.mixed)
    alone, _ = ours(args.shape, device, members=1)
    prompts = draw(args.mixed, RAGGED, vocabulary)
    take_turns(list(range(1, args.mixed + 1)))
    for name, each in (("one checkpoint", alone), (f"{args.mixed} checkpoints", decode)):
        found = rate(lambda e=each: e(prompts, args.answers[-1], args.mixed), device, repeats=args.repeats)
        yield {"work": f"mixed: {name}", **found}


def run_sides(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows of every side, each in a process of its own, as many at a time as there are GPUs for."""
    names = [*args.sides, *(["mixed"] if args.mixed else [])]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    free = SimpleQueue[str]()
    for gpu in (seen.split(",") if seen else map(str, range(args.gpus))) if args.gpus > 1 else [seen]:
        free.put(gpu)

    def run(name: str) -> list[dict[str, Any]]:
        gpu = free.get()
        try:
            return run_side(name, args, gpu)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(args.gpus) as pool:
        yield from pool.map(run, names)


def run_side(name: str, args: argparse.Namespace, gpu: str) -> list[dict[str, Any]]:
    """One side in a process of its own, on a GPU by its number; empty: on what there is."""
    python = args.peer_python if name == "pyreft" and args.peer_python else sys.executable
    environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    if name == "pyreft" and args.peer_path:
        environment["PYTHONPATH"] = args.peer_path
    command = [python, __file__, "--side", name, *sys.argv[1:]]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=args.timeout
        )
        out, error = done.stdout, done.stderr if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        out = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        error = f"stopped after {args.timeout} s"
    results = [{"side": name} | json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if error:
        results.append({"side": name, "error": error.strip().splitlines()[-1]})
        print(error[-2000:], file=sys.stderr)
    print(f"{name}: {time.perf_counter() - started:.0f} s {json.dumps(results)}", file=sys.stderr, flush=True)
    return results


def table(results: list[dict[str, Any]]) -> str:
    """A line for each workload, a column for each side."""
    sides = list(dict.fromkeys(row["side"] for row in results))
    works = list(dict.fromkeys(row["work"] for row in results if "work" in row))
    lines = [" ".join([f"{'tokens a second':24}", *(f"{name:>14}" for name in sides)])]
    for work in works:
        rates = {row["side"]: row["rate"] for row in results if row.get("work") == work}
        lines.append(" ".join([f"{work:24}", *(f"{rates.get(name, ''):>14}" for name in sides)]))
    return "\n".join([*lines, *(f"{row['side']} failed: {row['error']}" for row in results if "error" in row)])


def main() -> None:
    """Parse, measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=(*SIDES, "mixed"), help=argparse.SUPPRESS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--answers", nargs="+", type=int, default=[16, 128])
    parser.add_argument("--ragged", type=int, default=1000, help="prompts of the ragged workload; 0 leaves it out")
    parser.add_argument("--ragged-batch", type=int, default=128)
    parser.add_argument("--peer-rows", type=int, default=64)
    parser.add_argument("--mixed", type=int, default=64, help="checkpoints in one batch; 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=240, help="seconds for a side")
    parser.add_argument("--gpus", type=int, default=1, help="sides that run at the same time, each on a GPU of its own")
    parser.add_argument("--peer-python")
    parser.add_argument("--peer-path")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.side:
        for row in measure(args):
            print(json.dumps(row), flush=True)
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    results: list[dict[str, Any]] = []
    for rows in run_sides(args):
        results += rows
        facts = {"shape": args.shape, "device": device, "gpus": args.gpus, "results": results}
        keep(facts, table(results), output=args.output)
    several = f", {args.gpus} sides at a time, each on a GPU of its own" if args.gpus > 1 else ""
    print(f"{args.shape} on {device}{several}\n{table(results)}")


if __name__ == "__main__":
    main()
