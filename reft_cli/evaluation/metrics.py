"""Scores of predictions against references, by scikit-learn and scipy; texts are compared stripped.

The two libraries are imported where they are used: they take longer to import than most answers take to decode.
"""

from __future__ import annotations

import math
import operator
import re
import warnings
from collections.abc import Callable, Hashable, Sequence

LOWER_IS_BETTER = {"loss", "perplexity"}
FROM_LOSS = {"loss", "perplexity"}
NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|(?<!\d)\.\d+)")
TOLERANCE = 1e-3  # of numeric_match; pyreft's for arithmetic

Texts = Sequence[str]
Numbers = Sequence[float]


def by_source(metric: str, sources: Sequence[str], score: Callable[[list[int]], float]) -> dict[str, float]:
    """A score of all rows; where they are of several sources, that of each (`metric/source`), and their plain mean.

    `score` takes the indices of rows.
    """
    rows: dict[str, list[int]] = {}
    for index, name in enumerate(sources):
        rows.setdefault(name, []).append(index)
    if len(rows) < 2:
        return {metric: score(list(range(len(sources))))}
    scores = {f"{metric}/{name}": score(indices) for name, indices in rows.items()}
    return {metric: sum(scores.values()) / len(scores)} | scores


def score_texts(metric: str, predictions: Texts, references: Texts) -> float:
    """A score of answers as text.

    exact_match and accuracy are shares; f1 is the macro mean over the references' labels.
    numeric_match: the last number of the answer is within 1e-3 of the reference's last number; commas are dropped. A
    reference without a number, such as a letter, is compared as text.
    pearson and spearman read numbers the same way; an answer without one counts as 0.
    """
    assert references, "there is nothing to score"
    guesses, truths = [text.strip() for text in predictions], [text.strip() for text in references]
    if metric in ("exact_match", "accuracy"):
        return _accuracy(guesses, truths)
    if metric == "f1":
        from sklearn.metrics import f1_score

        return float(f1_score(truths, guesses, labels=sorted(set(truths)), average="macro", zero_division=0))
    if metric == "matthews":
        return _matthews(guesses, truths)
    found, wanted = [last_number(text) for text in guesses], [last_number(text) for text in truths]
    if metric == "numeric_match":
        hits = [
            abs(value - number) <= TOLERANCE
            if value is not None and number is not None
            else guess == truth and not NUMBER.search(truth)
            for guess, truth, value, number in zip(guesses, truths, found, wanted, strict=True)
        ]
        return sum(hits) / len(hits)
    return score_numbers(metric, [value or 0.0 for value in found], [value or 0.0 for value in wanted])


def score_classes(metric: str, predictions: Sequence[int], references: Sequence[int], *, classes: int) -> float:
    """A score of numbers below `classes`. f1: of class 1 if there are two (as GLUE), else the macro mean."""
    assert references, "there is nothing to score"
    if metric in ("accuracy", "exact_match"):
        return _accuracy(predictions, references)
    if metric == "matthews":
        return _matthews(predictions, references)
    from sklearn.metrics import f1_score

    average = "binary" if classes == 2 else "macro"
    return float(f1_score(references, predictions, average=average, zero_division=0))


def score_numbers(metric: str, predictions: Numbers, references: Numbers) -> float:
    """A correlation. One that does not exist, as of a constant, is 0; NaN if a number is not finite."""
    assert references, "there is nothing to score"
    import numpy as np
    from scipy.stats import NearConstantInputWarning, pearsonr, spearmanr

    correlation: Callable[..., object] = {"pearson": pearsonr, "spearman": spearmanr}[metric]
    if not (np.isfinite(predictions).all() and np.isfinite(references).all()):
        return math.nan
    if len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NearConstantInputWarning)
        return float(correlation(predictions, references).statistic)  # type: ignore[attr-defined]


def _accuracy(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> float:
    return sum(map(operator.eq, predictions, references)) / len(references)


def _matthews(predictions: Sequence[object], references: Sequence[object]) -> float:
    """0 where one class is all there is, as scikit-learn has it after a warning."""
    if len({*predictions, *references}) == 1:
        return 0.0
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(references, predictions))


def score_loss(metric: str, loss: float) -> float:
    """The loss itself in nats, or its exponential."""
    return loss if metric == "loss" else math.exp(min(loss, 700.0))


def last_number(text: str) -> float | None:
    """The last number in a text, thousands separators dropped; None if there is none that a float can hold."""
    numbers = NUMBER.findall(text.replace(",", ""))
    value = float(numbers[-1]) if numbers else math.nan
    return value if math.isfinite(value) else None
