#!/usr/bin/env python3
"""What it saves to read a head that rows begin with alike once: a template's, or solved rows.

    heads.py --shape 1b [--heads 43 130 512] [--mix commonsense|alpaca] [--positions f7+l7] [--steps 20] [--warmup 12]
             [--prompts 512] [--new 8] [--slots 64] [--plain] [--output RESULTS.json] [--markdown TABLE.md]

For each number of tokens in a head the mix's 32 rows a step are put behind it, and trained on with whole rows and with
the head once, in turn and twice, compiled and recorded as `reft train` would (`--plain`: neither). Then prompts of 20
to 120 tokens behind the head are answered with so many new tokens, each read whole and after the head that was read
once. Medians of a step, by the device's clock where there is one; the fastest of three calls for answers.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from generate import NoText, draw, endless, members_of, timed
from ours import examples_of, stepping, trainer_of
from results import keep
from train import by_device, waited
from train_sides import MIXES, SHAPES, Plan, random_llama

from reft_cli.data.examples import Example
from reft_cli.generation import decode
from reft_cli.generation.decode import Decoder
from reft_cli.generation.settings import Decoding, Request
from reft_cli.models.stacked import Stack

OWN = (20, 120)  # tokens of a prompt behind its head
CALLS = 3


def behind(head: list[int], examples: list[Example]) -> list[Example]:
    """Rows that all begin with the head."""
    return [
        Example([*head, *each.input_ids], len(head) + each.prompt_length, None, "", "", each.row) for each in examples
    ]


def training(model: Any, plan: Plan, head: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step and tokens of its passes, with whole rows and with the head once."""
    rows, fast = behind(head, examples_of(plan)), not args.plain
    times: dict[bool, list[float]] = {False: [], True: []}
    tokens: dict[bool, int] = {}
    for shared in (False, True, False, True):
        trainer = trainer_of(model, plan, examples=rows, compiled=fast, recorded=fast, cached=False, shared=shared)
        with stepping(trainer) as step:
            for _ in range(args.warmup):
                _, batch = step()
            tokens[shared] = sum(len(each.places) for each in batch.passes)
            loss = lambda: step()[0]  # noqa: E731
            gpu = plan.device == "cuda"
            times[shared] += by_device(loss, args.steps) if gpu else [waited(loss) for _ in range(args.steps)]
        del trainer
    whole, once = (statistics.median(times[shared]) for shared in (False, True))
    return {"whole": whole, "once": once, "ratio": once / whole, "tokens": tokens[False], "tokens_once": tokens[True]}


def answering(model: Any, plan: Plan, head: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds to answer all prompts, read whole and after the head."""
    stack = Stack(model, members_of(model, 1))
    requests = [Request([*head, *each], 1) for each in draw(args.prompts, OWN, SHAPES[plan.shape][5])]
    settings = Decoding(max_new_tokens=args.new, compile="off")
    decoders = {kept: Decoder(model, stack, tokenizer=NoText()) for kept in (False, True)}  # type: ignore[arg-type]
    decoders[False]._keeps = False
    times: dict[bool, list[float]] = {False: [], True: []}
    for call in range(CALLS + 1):
        for kept, decoder in decoders.items():

            def answer(decoder: Decoder = decoder) -> int:
                assert decoder.why_not_slots(settings) is None
                found = decoder.answers(requests, decoding=settings, batch_size=args.slots)
                return sum(answer.tokens for _, answer in found)

            made, seconds = timed(answer, plan.device)
            assert made == args.prompts * args.new
            times[kept] += [seconds] if call else []
    whole, once = (min(times[kept]) for kept in (False, True))
    return {"whole": whole, "once": once, "ratio": once / whole}


def table(args: argparse.Namespace, found: list[dict[str, Any]]) -> str:
    """The results as text."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines = [
        f"{args.shape} shape, {args.mix} rows behind a head, {args.positions}, "
        f"{'as they come' if args.plain else 'compiled and recorded'}; {args.prompts} prompts of {OWN[0]} to {OWN[1]} "
        f"tokens behind it, {args.new} new tokens, {args.slots} slots; {where}.",
        "",
        "| head | tokens a step, once | ms a step, once | ratio | seconds for answers, once | ratio |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for each in found:
        step, answers = each["training"], each["answering"]
        lines.append(
            f"| {each['head']} | {step['tokens']:,}, {step['tokens_once']:,} | {1e3 * step['whole']:.1f}, "
            f"{1e3 * step['once']:.1f} | {step['ratio']:.2f} | {answers['whole']:.2f}, {answers['once']:.2f} | "
            f"{answers['ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--heads", type=int, nargs="+", default=[43, 130, 512])
    parser.add_argument("--mix", choices=MIXES, default="commonsense")
    parser.add_argument("--positions", default="f7+l7")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decode.WORTH_TRYING = 0  # what it takes to try is paid in the first call
    found: list[dict[str, Any]] = []
    text = ""
    for count in args.heads:
        head = draw(1, (count, count), SHAPES[args.shape][5])[0]
        plan = Plan(args.shape, args.mix, device, args.positions, "all", 8, 2**16)
        model = random_llama(plan)
        step = training(model, plan, head, args)
        del model
        answers = answering(endless(args.shape, device), plan, head, args)
        found.append({"head": count, "training": step, "answering": answers})
        text = table(args, found)
        keep(
            {"asked": vars(args) | {"output": None, "markdown": None}, "found": found},
            text,
            output=args.output,
            markdown=args.markdown,
        )
    print(text, end="")


if __name__ == "__main__":
    main()
