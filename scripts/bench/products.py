#!/usr/bin/env python3
"""What the matrix products of a model's blocks take by themselves, forward and backward: no step can be faster.

    products.py --shape 8b [--rows 3840 4000 4096] [--layers 2] [--turns 7]

For each number of rows the seven products of a Llama block and those of their gradients to the input, bfloat16 on a
GPU, random numbers, of some layers' weights one after the other: the median of some turns in which all numbers of rows
come in a drawn order. Back to back a card runs at its power limit, which is below the rate of a few products.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
from torch import Tensor
from train_sides import SHAPES

GPU = torch.cuda.is_available()


def drawn(*shape: int) -> Tensor:
    """Random numbers on the device."""
    return torch.randn(*shape, device="cuda" if GPU else "cpu", dtype=torch.bfloat16 if GPU else torch.float32)


def products(weights: list[list[Tensor]], stream: Tensor, inner: Tensor, shared: Tensor) -> None:
    """All products of some blocks: of hidden states, of the MLP's inside, and of what keys and values have."""
    for q, k, v, o, gate, up, down in weights:
        for weight in (q, k, v, o, gate, up):
            stream @ weight.t()
        inner @ down.t()
        for upstream, weight in ((stream, down), (inner, gate), (inner, up), (stream, o), (stream, q), (shared, k)):
            upstream @ weight
        shared @ v


def seconds(weights: list[list[Tensor]], inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Of one round, after another."""
    products(weights, *inputs)
    if not GPU:
        started = time.perf_counter()
        products(weights, *inputs)
        return time.perf_counter() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    products(weights, *inputs)
    products(weights, *inputs)
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 2e3


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rows", type=int, nargs="+", default=[3840, 4000, 4096])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    hidden, inner, _, heads, shared, *_ = SHAPES[args.shape]
    narrow = hidden // heads * shared
    sizes = ((hidden, hidden), (narrow, hidden), (narrow, hidden), (hidden, hidden))
    sizes += ((inner, hidden), (inner, hidden), (hidden, inner))
    weights = [[drawn(*size) for size in sizes] for _ in range(args.layers)]
    inputs = {rows: (drawn(rows, hidden), drawn(rows, inner), drawn(rows, narrow)) for rows in args.rows}
    times: dict[int, list[float]] = {rows: [] for rows in args.rows}
    random.seed(0)
    for _ in range(args.turns):
        for rows in random.sample(args.rows, len(args.rows)):
            times[rows].append(seconds(weights, inputs[rows]))
    operations = 4 * sum(out * given for out, given in sizes)  # a row and layer, forward and backward
    for rows, found in times.items():
        took = statistics.median(found) / args.layers
        print(f"{rows:,} rows: {1e3 * took:.3f} ms a layer, {rows * operations / took / 1e12:.1f} TFLOP/s")


if __name__ == "__main__":
    main()
