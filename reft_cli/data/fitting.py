"""Whether examples fit into a model that has learned positions; a token too many would be an index out of range."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from reft_cli.data.examples import Example, Examples
from reft_cli.errors import DataError
from reft_cli.models.context import longest_sequence


def check_fits(examples: Sequence[Example], model: nn.Module, *, name: str, new_tokens: int = 0) -> None:
    """DataError naming the longest of those that do not fit, `name` and its row, with up to `new_tokens` generated."""
    limit = longest_sequence(model)
    if limit is None or not examples:
        return

    columns = Examples.of(examples)
    needed = np.maximum(columns.longest, columns.prompt_lengths + new_tokens)
    if needed.max() <= limit:
        return
    worst = columns[int(needed.argmax())]
    tokens = worst.longest
    if tokens > limit:
        takes, remedy = f"takes {tokens:,} tokens", f"shorten it, or set data.max_length: {limit} and data.on_overflow"
    else:
        takes = f"takes {worst.prompt_length:,} tokens for its prompt and up to {new_tokens:,} for its answer"
        remedy = f"allow {limit - worst.prompt_length} with max_new_tokens"
    raise DataError(f"{name} {worst.row}: {takes}, and the model has learned {limit:,} positions; {remedy}")
