#!/usr/bin/env python3
"""Seconds a training step and peak memory: ours, pyreft, PEFT's LoRA and the frozen model, in turn on one machine.

    train.py --shape 1b [--mix commonsense|alpaca] [--sides reft pyreft lora frozen] [--steps 20]
             [--peer-python PYTHON] [--peer-path FOLDER] [--output RESULTS.json]

Every side runs in a process of its own on the same random-weight Llama and the same drawn rows: f7+l7 tied, rank 8, all
layers, 32 rows a step; LoRA has rank 8 on q and v. Medians are over `--steps` steps after `--warmup`; each step ends
with a wait for the device. `frozen` is a forward and backward pass of the frozen model alone, padded as the peers pad,
with labels as they pass them; `floor` is 4 operations for each weight outside the embedding and each real token at
`--flops` a second. pyreft runs under --peer-python, or with --peer-path before everything else on its path.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embedding
    "tiny": (256, 704, 6, 8, 8, 4096, True),
    "gpt2": (768, 3072, 12, 12, 12, 50257, True),  # GPT-2 small's sizes
    "1b": (2048, 8192, 16, 32, 8, 128256, True),  # Llama-3.2-1B
    "8b": (4096, 14336, 32, 32, 8, 128256, False),  # Llama-3-8B
}
MIXES = {"commonsense": ((40, 199), (2, 11)), "alpaca": ((60, 400), (20, 400))}  # tokens of prompt and answer
ROWS, FIRST, LAST, RANK = 32, 7, 7, 8
Row = tuple[list[int], int]  # tokens, prompt length


def draw(mix: str, vocabulary: int, batches: int) -> list[list[Row]]:
    """The same rows on every side."""
    chance = random.Random(0)
    prompt, answer = MIXES[mix]

    def row() -> Row:
        length = chance.randint(*prompt)
        return [chance.randrange(10, vocabulary) for _ in range(length + chance.randint(*answer))], length

    return [[row() for _ in range(ROWS)] for _ in range(batches)]


def random_llama(shape: str, device: str) -> Any:
    """The shape with random weights, bfloat16 on a GPU, frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def padded(rows: list[Row], device: str) -> dict[str, torch.Tensor]:
    """What the peers' collators make: right-padded ids, mask and labels of the answers."""
    width = max(len(tokens) for tokens, _ in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for index, (tokens, prompt) in enumerate(rows):
        ids[index, : len(tokens)] = torch.tensor(tokens)
        mask[index, : len(tokens)] = 1
        labels[index, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return {key: value.to(device) for key, value in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


VARIANT = os.environ.get("VARIANT", "")
BUDGET = int(os.environ.get("BUDGET", "32768"))


def side_reft(shape: str, device: str, mix: str) -> Callable[[list[Row]], float]:
    """Our loop's own optimizer step."""
    from accelerate import Accelerator

    from reft_cli.data.encode import Example
    from reft_cli.models.build import build_intervened
    from reft_cli.models.loading import BaseModel, shape_hash
    from reft_cli.models.packing import why_not_packed
    from reft_cli.positions import Positions
    from reft_cli.tasks.objectives import TASKS
    from reft_cli.training.loop import Hooks, Trainer, TrainSettings
    from reft_cli.training.observer import NullObserver

    model = random_llama(shape, device)
    base = BaseModel(model.eval(), shape, None, shape_hash(model))
    positions = Positions.parse(f"f{FIRST}+l{LAST}")
    reason = why_not_packed(model)
    intervened = build_intervened(
        base, method="loreft", layers="all", component="block_output", positions=positions, tied=True, rank=RANK,
        init="paper", dropout=0.0, dropout_on="delta", seed=0,
    )  # fmt: skip
    settings = TrainSettings(
        epochs=1000, max_steps=None, learning_rate=9e-4, schedule="constant", warmup_ratio=0.0, weight_decay=0.0,
        max_grad_norm=1.0, global_batch_size=ROWS, micro_batch_size=None, token_budget=BUDGET,
        layout="padded" if reason else "packed", compiled="compile" in VARIANT, recorded="record" in VARIANT,
        seed=0, log_every=10**9, diverge_factor=1e9, validate_every="never", save_every=10**9, patience=None,
        lower_is_better=True, best_metric="loss",
    )  # fmt: skip
    hooks = Hooks(None, lambda *_: None, lambda _: None, lambda *_: None, lambda: None, str)
    trainer = Trainer(
        intervened, task=TASKS["causal_lm"], examples=[Example([1], 1, None, "", "", 1)] * ROWS,
        groups=positions.groups(tied=True), pad_token_id=0, settings=settings, accelerator=Accelerator(),
        observer=NullObserver(), hooks=hooks,
    )  # fmt: skip
    intervened.train()
    entered = ExitStack()  # for as long as the process lives; a context that nobody holds ends at once
    entered.enter_context(intervened)
    entered.enter_context(trainer.running())

    def step(rows: list[Row], _: ExitStack = entered) -> float:
        examples = [Example(tokens, prompt, None, "", "", row) for row, (tokens, prompt) in enumerate(rows)]
        loss, _, _ = trainer._step(examples)
        return float(loss)

    return step


def side_pyreft(shape: str, device: str, mix: str) -> Callable[[list[Row]], float]:
    """pyreft's trainer's compute_loss with its own model, interventions and locations; AdamW over them."""
    import pyreft

    model = random_llama(shape, device)
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
    reft.train()
    optimizer = torch.optim.AdamW([p for p in reft.parameters() if p.requires_grad], lr=9e-4, weight_decay=0.0)

    def step(rows: list[Row]) -> float:
        batch = padded([([0, *tokens], prompt + 1) for tokens, prompt in rows], device)  # pyreft's sink token
        batch["attention_mask"][:, 0] = 0
        locations = [
            pyreft.get_intervention_locations(
                last_position=prompt, first_n=FIRST, last_n=LAST, num_interventions=layers, share_weights=True
            )
            for _, prompt in rows
        ]
        units = torch.tensor(locations).permute(1, 0, 2) + 1
        _, output = reft(
            {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]},
            unit_locations={"sources->base": (None, units.tolist())},
            labels=batch["labels"],
            subspaces=None,
        )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in reft.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(output.loss.detach())

    return step


def side_lora(shape: str, device: str, mix: str) -> Callable[[list[Row]], float]:
    """PEFT's LoRA, rank 8 on q and v; AdamW over it."""
    import peft

    model = peft.get_peft_model(
        random_llama(shape, device), peft.LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=9e-4, weight_decay=0.0)

    def step(rows: list[Row]) -> float:
        output = model(**padded(rows, device), use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(output.loss.detach())

    return step


def side_frozen(shape: str, device: str, mix: str) -> Callable[[list[Row]], float]:
    """The frozen model forward and backward to its embeddings, and nothing else."""
    model = random_llama(shape, device).train()

    def step(rows: list[Row]) -> float:
        batch = padded(rows, device)
        embedded = model.get_input_embeddings()(batch.pop("input_ids")).requires_grad_(True)
        output = model(inputs_embeds=embedded, use_cache=False, **batch)
        output.loss.backward()
        return float(output.loss.detach())

    return step


SIDES = {"reft": side_reft, "pyreft": side_pyreft, "lora": side_lora, "frozen": side_frozen}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = draw(args.mix, SHAPES[args.shape][5], 4)
    step = SIDES[args.side](args.shape, device, args.mix)
    times, loss = [], 0.0
    for index in range(args.warmup + args.steps):
        if index == args.warmup and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss = step(batches[index % len(batches)])  # reading the loss waits for the device
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    import transformers

    return {
        "side": args.side,
        "seconds": round(statistics.median(times[args.warmup :]), 5),
        "slowest": round(max(times[args.warmup :]), 5),
        "first": round(times[0], 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device == "cuda" else None,
        "loss": round(loss, 4),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def floor(args: argparse.Namespace) -> float:
    """Seconds that the arithmetic alone takes: 4 operations a weight outside the embedding and a real token."""
    hidden, inner, layers, heads, kv_heads, vocabulary, _ = SHAPES[args.shape]
    block = 2 * hidden * hidden + 2 * hidden * hidden * kv_heads // heads + 3 * hidden * inner
    batches = draw(args.mix, vocabulary, 4)
    tokens = statistics.mean(sum(len(tokens) for tokens, _ in rows) for rows in batches)
    return 4 * block * layers * tokens / args.flops


def run_sides(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every side in a process of its own, one after the other."""
    found = []
    for side in args.sides:
        peer = side == "pyreft"
        python = args.peer_python if peer and args.peer_python else sys.executable
        environment = dict(os.environ)
        if peer and args.peer_path:
            environment["PYTHONPATH"] = args.peer_path
        command = [python, __file__, "--side", side, "--shape", args.shape, "--mix", args.mix]
        command += ["--steps", str(args.steps), "--warmup", str(args.warmup)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        last = done.stdout.strip().splitlines()[-1:] or [""]
        failed = {"side": side, "error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
        found.append(json.loads(last[0]) if done.returncode == 0 else failed)
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Parse, measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--mix", choices=MIXES, default="commonsense")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--flops", type=float, default=790e12, help="operations a second of the device, measured")
    parser.add_argument("--peer-python")
    parser.add_argument("--peer-path")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return
    results = run_sides(args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    whole: dict[str, Any] = {"shape": args.shape, "mix": args.mix, "rows": ROWS, "device": device}
    if torch.cuda.is_available():
        whole["floor"] = round(floor(args), 5)
    if args.output:
        args.output.write_text(json.dumps(whole | {"sides": results}, indent=2) + "\n")
    print(
        f"{args.shape} {args.mix} on {device}" + (f"; arithmetic floor {whole['floor']} s" if "floor" in whole else "")
    )
    for row in results:
        if "error" in row:
            print(f"{row['side']:8} failed: {row['error']}")
        else:
            memory = f"  {row['peak_gib']:6.1f} GiB" if row["peak_gib"] else ""
            print(f"{row['side']:8} {row['seconds']:.4f} s{memory}  loss {row['loss']}")


if __name__ == "__main__":
    main()
