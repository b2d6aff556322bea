"""How many tokens go into one pass: tried on the heaviest micro-batch, halved until it fits in every process.

The global batch stays what it is; smaller passes only mean more of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from reft_cli.data.batch import cuts
from reft_cli.data.examples import Example, Examples
from reft_cli.parallel.collective import size, smallest

PROBED = ("cuda", "xpu")  # devices that say when they are full; on a CPU the kernel ends the process instead
SHY = 0.5  # part of a budget above which the heaviest micro-batch was cut off by it
FULL = ("CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device is full; some libraries say so in a plain RuntimeError."""
    full = isinstance(error, RuntimeError) and any(words in str(error) for words in FULL)
    return isinstance(error, torch.OutOfMemoryError) or full


def heaviest(examples: Sequence[Example], *, rows: int, token_budget: int, padded: bool) -> Examples:
    """The micro-batch of the longest rows, of a process's share of `rows` of them."""
    ranked = Examples.of(examples).longest_first()[: math.ceil(rows / size())]
    return ranked[next(cuts(ranked.lengths.tolist(), token_budget=token_budget, rows=None, padded=padded))]


def tokens_in(examples: Examples, *, padded: bool) -> int:
    """Tokens of a micro-batch, padding included."""
    lengths = examples.lengths
    return int(lengths.max()) * len(lengths) if padded else int(lengths.sum())


def fitting_budget(
    first: int,
    *,
    examples: Sequence[Example],
    global_batch_size: int,
    padded: bool,
    attempt: Callable[[Examples], None],
) -> int:
    """The tokens, at most `first`, of a heaviest micro-batch that goes through `attempt` in every process.

    Every process comes to the same. OutOfMemoryError: not even the longest row by itself goes through.
    """
    budget = first
    while True:
        batch = heaviest(examples, rows=global_batch_size, token_budget=budget, padded=padded)
        tokens = tokens_in(batch, padded=padded)
        failure = _failure(attempt, batch)
        if smallest(int(failure is None)):
            return tokens if budget < first or tokens > SHY * first else first  # others may be filled to the brim
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            cause = failure or "another process's device is full"
            raise torch.OutOfMemoryError(f"with one row of {tokens:,} tokens at a time: {cause}")
        budget = tokens // 2


def _failure(attempt: Callable[[Examples], None], batch: Examples) -> str | None:
    """What was said if there was too little memory; the error itself would hold on to what is in it."""
    try:
        attempt(batch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return str(error)
    return None
