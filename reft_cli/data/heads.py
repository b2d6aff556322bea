"""The head that rows begin with alike, as those of one template do: how many tokens of it may be read once for all.

Attention is causal, so a token's hidden states depend on what stands before it and on which of those tokens are edited.
Where both are the same in all rows, so are the states. Shapes: B sequences, P tokens of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from reft_cli.data.examples import Example, Examples
from reft_cli.positions import PositionGroup

LEAST = 16  # tokens; less is not worth an attention of its own
START = 64  # tokens that could be read in the time it takes to start a pass
TOGETHER = 1024  # sequences compared at once, which bounds the memory for it


def common_head(examples: Examples, *, groups: Sequence[PositionGroup]) -> int:
    """Tokens P that all sequences begin with, edited alike in each; 0 where they are few or there is one sequence.

    At least one token of every prompt comes after them, so that no answer is predicted inside the head.
    """
    alike = int(np.minimum(examples.prompt_lengths, examples.lengths).min()) - 1 if len(examples) > 1 else 0
    for start in range(1, len(examples), TOGETHER):
        if alike < LEAST:
            return 0
        others = np.arange(start, min(start + TOGETHER, len(examples)))
        alike = _alike(examples.take(np.append(0, others)), groups=groups, most=alike)
    return alike if alike >= LEAST else 0


def _alike(examples: Examples, *, groups: Sequence[PositionGroup], most: int) -> int:
    """Of the first `most` tokens, how many the sequences begin with alike."""
    tokens = examples.tokens[examples.spans[:, :1] + np.arange(most)]  # [B, P]
    differs = (tokens != tokens[0]).any(0)
    sizes = list(zip(examples.prompt_lengths.tolist(), examples.lengths.tolist(), strict=True))
    for group in groups:
        edited = np.zeros(tokens.shape, dtype=bool)
        for row, (prompt, length) in zip(edited, sizes, strict=True):
            for span in group.ranges(prompt, length):
                row[span.start : span.stop] = True
        differs |= (edited != edited[0]).any(0)
    return int(differs.argmax()) if differs.any() else most


def typical_head(examples: Sequence[Example], *, groups: Sequence[PositionGroup], rows: int) -> int:
    """The common head of so many rows from all over the data, as a pass has them."""
    columns = Examples.of(examples)
    chosen = np.linspace(0, len(columns) - 1, min(rows, len(columns))).astype(np.int64)
    return common_head(columns.take(chosen), groups=groups)


def cut_alike(examples: Sequence[Example], *, rows: int) -> list[list[Example]]:
    """Passes of at most `rows` sequences, longest first, so that heads read once a pass save the most tokens.

    In the order of their tokens sequences stand beside those that begin like them. Of all cuts of that order the
    cheapest is found from its front: a pass of B sequences costs `START` + Σ length - P (B - 1) tokens.
    """
    ordered = sorted(examples, key=lambda each: each.input_ids)
    alike = [0, *(_alike_prompts(*each) for each in pairwise(ordered))]  # tokens that each shares with the one before
    costs, begins = [0.0], [0]  # of the first so many sequences, and where their last pass begins
    for end in range(1, len(ordered) + 1):
        ways, tokens, head = [], 0, len(ordered[end - 1].input_ids)
        for start in range(end - 1, max(end - rows, 0) - 1, -1):
            tokens += len(ordered[start].input_ids)
            saved = head * (end - start - 1) if head >= LEAST else 0
            ways.append((costs[start] + START + tokens - saved, start))
            head = min(head, alike[start])
        cost, begin = min(ways)
        costs.append(cost)
        begins.append(begin)
    passes, end = [], len(ordered)
    while end:
        passes.append(sorted(ordered[begins[end] : end], key=lambda each: -len(each.input_ids)))
        end = begins[end]
    return passes[::-1]


def _alike_prompts(one: Example, other: Example) -> int:
    """Tokens that two prompts begin with alike, but for the last of the shorter."""
    most = max(min(one.prompt_length, other.prompt_length) - 1, 0)
    return next((at for at in range(most) if one.input_ids[at] != other.input_ids[at]), most)
