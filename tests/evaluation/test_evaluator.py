"""Losses and scores of an evaluation are those of each row by itself, worked out from the model's own logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from reft_cli.data.batch import build_batch
from reft_cli.data.examples import Example
from reft_cli.evaluation.evaluate import Evaluation, Evaluator
from reft_cli.evaluation.extraction import Extraction
from reft_cli.generation.settings import Answer, Decoding
from reft_cli.models.build import build_intervened
from reft_cli.models.intervened import IntervenedModel
from reft_cli.positions import Positions
from tiny_models import base_of, byte_tokenizer

POSITIONS = Positions.parse("f2+l1")
GROUPS = POSITIONS.groups(tied=True)
BOTH = pytest.mark.parametrize("edited", [True, False])
WAYS = pytest.mark.parametrize("way", [{}, {"layout": "packed"}, {"layout": "packed", "shared": True}], ids=repr)
HEAD = [(7 * token) % 90 + 100 for token in range(19)]


def intervened(family: str) -> IntervenedModel:
    return build_intervened(
        base_of(family), method="loreft", layers="all", component="block_output", positions=POSITIONS, tied=True,
        rank=4, init="paper", dropout=0.0, dropout_on="delta", seed=0,
    ).eval()  # fmt: skip


def ids(count: int, salt: int) -> list[int]:
    return [(salt * 31 + 17 * token * token) % 280 + 5 for token in range(count)]


def logits(model: IntervenedModel, example: Example, edited: bool) -> torch.Tensor:
    """Of a row alone."""
    batch = build_batch([replace(example, rejected=None)], groups=GROUPS, layout="padded", pad_token_id=1)
    with torch.no_grad(), model.editing(batch.rows if edited else None):
        return model.base_model(torch.tensor([example.input_ids])).logits[0].double()


def answer_log_probability(model: IntervenedModel, example: Example, edited: bool) -> float:
    table = logits(model, example, edited).log_softmax(-1)
    pairs = enumerate(example.input_ids[example.prompt_length :], start=example.prompt_length - 1)
    return sum(table[place, token].item() for place, token in pairs)


def evaluated(
    model: IntervenedModel,
    kind: str,
    metric: str,
    rows: list[Example],
    *,
    edited: bool,
    labels: list[str] | None = None,
    **given: object,
) -> tuple[Evaluation, list[tuple[int, int]]]:
    """In passes of two or three rows; and what was told of the progress."""
    told: list[tuple[int, int]] = []
    evaluator = Evaluator(
        kind, metric, labels, GROUPS, byte_tokenizer(), Decoding(max_new_tokens=4), None, **{"token_budget": 30} | given
    )  # type: ignore[arg-type]
    tell: Callable[[int, int], None] = lambda done, total: told.append((done, total))  # noqa: E731
    return evaluator.run(model, rows, prompts=[], edited=edited, on_progress=tell), told


@BOTH
@WAYS
@pytest.mark.parametrize("head", [[], HEAD], ids=["", "one head"])
def test_the_loss_of_texts_is_the_mean_over_all_answer_tokens(edited: bool, way: dict, head: list[int]):
    rows = [
        Example(head + ids(4 + row, row), len(head) + 2 + row // 2, None, "", "", row, source="ab"[row % 2])
        for row in range(7)
    ]
    way = way | {"token_budget": 30 + 3 * len(head)}
    with intervened("llama") as model:
        found, told = evaluated(model, "causal_lm", "perplexity", rows, edited=edited, **way)
        wanted = -sum(answer_log_probability(model, each, edited) for each in rows)
    wanted /= sum(len(each.input_ids) - each.prompt_length for each in rows)
    assert found.metrics["loss"] == pytest.approx(wanted, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(2.718281828**wanted, rel=1e-4)
    assert len(told) > 1 and told[-1] == (7, 7) and told == sorted(told)


@BOTH
def test_classes_are_those_of_the_largest_logit(edited: bool):
    rows = [Example(ids(3 + row, row), 3 + row, row % 3, "", "", row, source="ab"[row > 2]) for row in range(8)]
    with intervened("roberta") as model:
        found, told = evaluated(model, "classification", "accuracy", rows, edited=edited, labels=["x", "y", "z"])
        tables = [logits(model, each, edited).log_softmax(-1) for each in rows]
    losses = [-table[each.label].item() for table, each in zip(tables, rows, strict=True)]
    best = [int(table.argmax()) for table in tables]
    assert found.metrics["loss"] == pytest.approx(sum(losses) / 8, rel=1e-5)
    hits = [a == each.label for a, each in zip(best, rows, strict=True)]
    first, second = sum(hits[:3]) / 3, sum(hits[3:]) / 5
    assert [found.metrics[f"accuracy{name}"] for name in ("", "/a", "/b")] == [(first + second) / 2, first, second]
    assert first != second
    assert [each["prediction"] for each in found.samples] == ["xyz"[one] for one in best]
    assert [each["reference"] for each in found.samples] == ["xyz"[each.label] for each in rows]
    assert told[-1] == (8, 8) and told == sorted(told)


@BOTH
@WAYS
def test_the_loss_of_pairs_is_that_of_their_rewards(edited: bool, way: dict):
    rows = []
    for row in range(5):
        start = ids(3 + row, row)
        other = Example(start + ids(1 + row % 3, 50), len(start), None, "", "", row)
        rows.append(Example(start + ids(2 + row % 2, 90), len(start), None, "", "", row, rejected=other))
    kept: dict = {}
    with intervened("llama") as model:
        evaluated(model, "preference", "accuracy", rows[1:2], edited=edited, beta=0.5, references=kept, **way)
        found, told = evaluated(model, "preference", "accuracy", rows, edited=edited, beta=0.5, references=kept, **way)
        again, _ = evaluated(model, "preference", "accuracy", rows, edited=edited, beta=0.5, references=kept, **way)
        rewards = [
            [0.5 * (answer_log_probability(model, one, edited) - answer_log_probability(model, one, False))
             for one in (each, each.rejected)]
            for each in rows
        ]  # fmt: skip
    margins = torch.tensor(rewards).diff(dim=1).neg().flatten()
    assert found.metrics["loss"] == pytest.approx(-logsigmoid(margins).mean().item(), rel=1e-4)
    assert found.metrics["margin"] == pytest.approx(margins.mean().item(), rel=1e-3, abs=1e-4)
    assert again.metrics == pytest.approx(found.metrics, abs=1e-5) and len(kept) == 5
    assert [each["prediction"] for each in found.samples] == pytest.approx(margins.tolist(), abs=1e-4)
    assert told[0][0] < 5 and told[-1] == (5, 5) and told == sorted(told)


def test_an_answer_in_which_nothing_is_found_is_wrong_and_a_reference_without_a_number_is_taken_whole():
    given = [("so 12", " 12", None), ("12 or 13", " 12", None), ("what", " none", None), ("it is 7.", " 3", "7")]
    rows = [Example([5, 6, 7], 2, None, "", said, row, reference=own) for row, (_, said, own) in enumerate(given)]
    evaluator = Evaluator(
        "causal_lm", "exact_match", None, GROUPS, byte_tokenizer(), Decoding(), None, 30,
        rule=Extraction(pattern=r"\d+", take="last"), reads_loss=False,
    )  # fmt: skip
    answers = [Answer(text, 3, True) for text, _, _ in given]
    found = evaluator.run(intervened("llama"), rows, prompts=[], answers=answers)
    assert found.metrics == {"exact_match": 0.5}
    assert [each["answer"] for each in found.samples] == ["12", "13", "", "7"]
    assert [each["reference"] for each in found.samples] == ["12", "12", " none", "7"]
