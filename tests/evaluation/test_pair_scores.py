"""Scores of pairs: how often the chosen answer has the higher reward, and by how much."""

import pytest

from reft_cli.data.examples import Example
from reft_cli.evaluation.pairs import pair_samples, score_pairs


def example(row, source=""):
    return Example([1, 2], 1, None, "p", "good", row, source=source, rejected=Example([1, 3], 1, None, "p", "bad", row))


def test_equal_rewards_count_half():
    examples = [example(row) for row in range(4)]
    found = score_pairs(examples, [(1.0, 0.5), (2.0, 2.0), (-1.0, 1.0), (0.0, -4.0)])
    assert found == {"accuracy": 0.625, "margin": pytest.approx((0.5 + 0 - 2 + 4) / 4)}


def test_each_source_has_its_own():
    examples = [example(1, "a"), example(2, "b"), example(3, "b")]
    found = score_pairs(examples, [(1.0, 0.0), (0.0, 1.0), (3.0, 0.0)])
    assert found["accuracy"] == 0.75 and found["accuracy/a"] == 1.0 and found["accuracy/b"] == 0.5
    assert found["margin"] == 1.0 and found["margin/b"] == 1.0


def test_a_sample_has_both_answers_and_the_margin():
    (sample,) = pair_samples([example(7)], [(0.25, -0.5)])
    assert sample == {"row": 7, "prompt": "p", "reference": "good", "rejected": "bad", "prediction": 0.75}
