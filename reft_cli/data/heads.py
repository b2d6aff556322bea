"""The head that rows begin with alike, as those of one template do: how many tokens of it may be read once for all.

Attention is causal, so a token's hidden states depend on what stands before it and on which of those tokens are edited.
Where both are the same in all rows, so are the states. Shapes: B sequences, P tokens of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reft_cli.data.examples import Example, Examples
from reft_cli.positions import PositionGroup

LEAST = 16  # tokens; less is not worth an attention of its own
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
