"""Scores of rewards for pairs of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reft_cli.data.examples import Example
from reft_cli.evaluation.metrics import by_source

Pairs = Sequence[Sequence[float]]  # rewards of the chosen and the rejected answer


def score_pairs(examples: Sequence[Example], rewards: Pairs) -> dict[str, float]:
    """accuracy: how often the chosen answer's reward is the higher one (equal ones count half); margin: by how much.

    Where rows are of several sources, each has its own and the plain mean counts.
    """
    margins = [chosen - rejected for chosen, rejected in rewards]
    hits = [0.5 + 0.5 * ((margin > 0) - (margin < 0)) for margin in margins]
    sources = [example.source for example in examples]

    def mean(values: Sequence[float], rows: Sequence[int]) -> float:
        return sum(values[row] for row in rows) / len(rows)

    return by_source("accuracy", sources, lambda rows: mean(hits, rows)) | by_source(
        "margin", sources, lambda rows: mean(margins, rows)
    )


def pair_samples(examples: Sequence[Example], rewards: Pairs) -> list[dict[str, Any]]:
    """For each pair its texts, and as the prediction the reward of the chosen answer less that of the rejected one."""
    return [
        {
            "row": each.row,
            "prompt": each.prompt,
            "reference": each.completion,
            "rejected": each.rejected.completion if each.rejected else None,
            "prediction": chosen - rejected,
        }
        for each, (chosen, rejected) in zip(examples, rewards, strict=True)
    ]
