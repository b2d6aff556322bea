"""Every metric against values worked out by hand, and what it says of the empty, the constant and the odd."""

from __future__ import annotations

import math

import pytest

from reft_cli.evaluation.metrics import (
    FROM_LOSS,
    LOWER_IS_BETTER,
    last_number,
    score_classes,
    score_loss,
    score_numbers,
    score_texts,
)
from reft_cli.spec.task import FITTING_METRICS

METRICS = FITTING_METRICS["causal_lm"]  # `margin` is of pairs alone: test_pair_scores.py
GUESSES, TRUTHS = ["yes", "no ", " yes", "Yes"], ["yes", "yes", "no", "yes\n"]


@pytest.mark.parametrize(
    ("metric", "score"),
    [
        ("exact_match", 1 / 4),  # only the first; white space around does not count, capitals do
        ("accuracy", 1 / 4),
        ("f1", (2 * 1 / (2 * 1 + 1 + 2) + 0) / 2),  # yes: tp 1, fp 1, fn 2; no: tp 0. `Yes` is no label of theirs
    ],
)
def test_texts(metric: str, score: float):
    assert score_texts(metric, GUESSES, TRUTHS) == pytest.approx(score)


def test_matthews_of_texts_is_that_of_the_table():
    guesses, truths = ["a", "a", "a", "b", "b"], ["a", "a", "b", "b", "b"]
    tp, tn, fp, fn = 2, 2, 1, 0
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert score_texts("matthews", guesses, truths) == pytest.approx(expected) == pytest.approx(2 / 3)
    numbers = {"a": 1, "b": 0}
    given = [[numbers[each] for each in texts] for texts in (guesses, truths)]
    assert score_classes("matthews", *given, classes=2) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("guess", "truth", "right"),
    [
        ("The answer is 1,234.", "1234", True),
        ("so 5 - 3 = 2", "#### 2", True),
        ("-3", "3", False),
        ("it is -3.50 degrees", "-3.5", True),
        ("3.1416", "3.1415926", True),
        ("3.1431", "3.1415926", False),
        (".5", "0.5", True),
        ("about 7", "7 apples, then 8", False),
        ("seven", "7", False),
        ("7", "seven", False),
        ("seven", "seven", True),  # no number: compared as text
        ("B", "A", False),
        ("", "0", False),
        ("9" * 400, "9" * 400, False),  # no float holds it
        ("$2,000,000.00!", "2000000", True),
    ],
)
def test_numeric_match_compares_the_last_numbers(guess: str, truth: str, right: bool):
    assert score_texts("numeric_match", [guess, "1"], [truth, "1"]) == (1.0 if right else 0.5)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234,567.5 km", 1234567.5),
        ("from 3 to -4", -4.0),
        ("version 1.5.2", 2.0),
        ("5.", 5.0),
        ("a.5", 0.5),
        ("no", None),
        ("-", None),
        ("", None),
    ],
)
def test_the_last_number(text: str, number: float | None):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("metric", "classes", "score"),
    [
        ("accuracy", 2, 3 / 5),
        ("exact_match", 2, 3 / 5),
        ("f1", 2, 2 * 2 / (2 * 2 + 1 + 1)),  # of class 1, as GLUE: tp 2, fp 1, fn 1
        ("f1", 3, (2 * 2 / (2 * 2 + 1 + 1) + 2 * 1 / (2 * 1 + 1 + 1)) / 2),  # the mean, whatever rows were drawn
        ("matthews", 2, (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)),
    ],
)
def test_classes(metric: str, classes: int, score: float):
    assert score_classes(metric, [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], classes=classes) == pytest.approx(score)


def test_three_classes():
    guesses, truths = [0, 1, 2, 2], [0, 1, 1, 2]
    assert score_classes("accuracy", guesses, truths, classes=3) == 0.75
    assert score_classes("f1", guesses, truths, classes=3) == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


@pytest.mark.parametrize("number", [0, 1])
def test_one_class_is_no_accident(number: int):
    """Without a class to tell apart accuracy is 1; F1 is of class 1; Matthews' coefficient is undefined: 0."""
    same = [number] * 4
    assert score_classes("accuracy", same, same, classes=2) == 1.0
    assert score_classes("f1", same, same, classes=2) == number
    assert score_classes("matthews", same, same, classes=2) == 0.0
    assert score_classes("matthews", same, [1 - number] * 4, classes=2) == 0.0
    assert score_texts("matthews", ["a"], ["a"]) == 0.0
    assert score_texts("f1", ["b", "b"], ["a", "a"]) == 0.0


def test_correlations():
    x, y = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 10.0]  # Σ(x−x̄)(y−ȳ) = 13, Σ(x−x̄)² = 5, Σ(y−ȳ)² = 50
    assert score_numbers("pearson", x, y) == pytest.approx(13 / math.sqrt(5 * 50))
    assert score_numbers("spearman", x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))  # ranks 1 3 2 4: Σd² = 2
    assert score_numbers("spearman", x, [-each for each in y]) == pytest.approx(-0.8)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_correlations_that_do_not_exist(metric: str):
    assert score_numbers(metric, [1, 1, 1], [1, 2, 3]) == 0.0
    assert score_numbers(metric, [1, 2, 3], [2, 2, 2]) == 0.0
    assert score_numbers(metric, [1], [2]) == 0.0
    assert -1 <= score_numbers(metric, [1 + 1e-12, 1, 1], [1, 2, 3]) <= 1  # nearly constant: no warning
    assert score_numbers(metric, [1e300, 2e300, 3e300], [1, 2, 3]) == pytest.approx(1)
    for wild in (math.nan, math.inf):
        assert math.isnan(score_numbers(metric, [wild, 1, 2], [1, 2, 3]))


def test_answers_are_read_as_numbers_for_a_correlation():
    """1, 3 and, for want of a number, 0 against 2, 4, 6: covariance −2, squares 42/9 and 8."""
    assert score_texts("pearson", ["1.0!", "so 3", "none"], ["2", "4", "6"]) == pytest.approx(
        -2 / math.sqrt(42 / 9 * 8)
    )


def test_losses():
    assert score_loss("loss", 1.5) == 1.5
    assert score_loss("perplexity", math.log(7)) == pytest.approx(7)
    assert math.isfinite(score_loss("perplexity", 1e9))
    assert FROM_LOSS == LOWER_IS_BETTER == {"loss", "perplexity"}


def test_many_different_texts_raise_no_warning():
    texts = [f"answer {number}" for number in range(300)]
    for metric in ("exact_match", "f1", "matthews"):
        assert score_texts(metric, texts, texts[::-1]) == pytest.approx(0.0, abs=0.01)
        assert score_texts(metric, texts, texts) == pytest.approx(1.0)


@pytest.mark.parametrize("metric", [each for each in METRICS if each not in FROM_LOSS])
def test_nothing_cannot_be_scored(metric: str):
    with pytest.raises(AssertionError, match="nothing to score"):
        score_texts(metric, [], [])


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_of_the_spec_is_computed_for_every_task_that_may_ask_for_it(metric: str):
    if metric in FROM_LOSS:
        return
    assert score_texts(metric, ["1", "2"], ["1", "2"]) == pytest.approx(1)
    if metric in FITTING_METRICS["classification"]:
        assert score_classes(metric, [0, 1], [0, 1], classes=2) == pytest.approx(1)
    if metric in FITTING_METRICS["regression"]:
        assert score_numbers(metric, [1, 2], [1, 2]) == pytest.approx(1)
