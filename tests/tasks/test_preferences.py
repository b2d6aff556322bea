"""Objectives on pairs: DPO with the model itself as the reference, and rewards from a head."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from reft_cli.data.batch import build_batch, micro_batches
from reft_cli.data.examples import Example
from reft_cli.models.build import build_intervened
from reft_cli.positions import Positions
from reft_cli.tasks.preferences import (
    Preference,
    Reward,
    pair_loss,
    pair_task_of,
    sequence_log_probabilities,
    task_of,
)
from tiny_models import base_of

POSITIONS = Positions.parse("f2+l1")


def pair(row, prompt, chosen, rejected):
    def ids(count, salt):
        return [(7 * row + 3 * token + salt) % 280 + 5 for token in range(count)]

    start = ids(prompt, 0)
    other = Example(start + ids(rejected, 50), prompt, None, "", "b", row)
    return Example(start + ids(chosen, 90), prompt, None, "", "a", row, rejected=other)


PAIRS = [pair(1, 4, 3, 7), pair(2, 9, 1, 2), pair(3, 2, 6, 1)]


def built(family="llama"):
    model = build_intervened(
        base_of(family),
        method="loreft",
        layers="all",
        component="block_output",
        positions=POSITIONS,
        tied=True,
        rank=2,
        init="paper",
        dropout=0.0,
        dropout_on="delta",
        seed=0,
    )
    model.bank.refresh()
    return model


def batch_of(pairs=PAIRS, layout="padded"):
    return build_batch(pairs, groups=POSITIONS.groups(tied=True), layout=layout, pad_token_id=1)


def plain(model, example, *, edited):
    """log p(answer | prompt) by the model's own logits."""
    alone = build_batch([example], groups=POSITIONS.groups(tied=True), layout="padded", pad_token_id=1)
    with torch.no_grad(), model.editing(alone.rows if edited else None):
        table = model.base_model(**alone.inputs).logits[0].log_softmax(-1)
    answer = example.input_ids[example.prompt_length :]
    return float(table[example.prompt_length - 1 :][range(len(answer)), answer].sum())


def test_log_probabilities_are_those_of_each_sequence_alone():
    model, batch = built(), batch_of()
    with model:
        for edited in (False, True):
            with torch.no_grad(), model.editing(batch.rows if edited else None):
                found = sequence_log_probabilities(model, batch)
            wanted = [[plain(model, each, edited=edited) for each in (one, one.rejected)] for one in PAIRS]
            torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_without_edits_the_reference_is_met_exactly(layout, family):
    if (layout, family) == ("packed", "gemma2"):
        pytest.skip("soft-capped attention is not packed")
    model, batch, task = built(family), batch_of(layout=layout), Preference(beta=0.3)
    with model, torch.no_grad(), model.packing(layout == "packed"), model.editing(None):
        assert task.rewards(model, batch).tolist() == [[0.0, 0.0]] * 3  # the very same bits
        assert float(task.loss(model, batch)) == pytest.approx(3 * math.log(2))


def test_rewards_are_beta_times_what_the_edits_change():
    model, batch = built(), batch_of()
    with model, torch.no_grad(), model.editing(batch.rows):
        found = Preference(beta=0.3).rewards(model, batch)
        loss = Preference(beta=0.3).loss(model, batch)
    with model:
        wanted = [
            [0.3 * (plain(model, each, edited=True) - plain(model, each, edited=False)) for each in (one, one.rejected)]
            for one in PAIRS
        ]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-4, rtol=1e-4)
    by_hand = -sum(float(logsigmoid(torch.tensor(chosen - rejected))) for chosen, rejected in wanted)
    assert float(loss) == pytest.approx(by_hand, abs=1e-4)


def gradients(model, batches, task, layout="padded"):
    model.bank.zero_grad()
    model.bank.refresh()
    with model, model.packing(layout == "packed"):
        for batch in batches:
            with model.editing(batch.rows):
                task.loss(model, batch).backward()
    model.bank.backpropagate()
    return {name: p.grad.clone() for name, p in model.bank.named_parameters()}


def test_packed_and_cut_batches_have_the_same_gradients():
    model, task = built(), Preference(beta=0.3)
    whole = gradients(model, [batch_of()], task)
    parts = [batch_of(part) for part in micro_batches(PAIRS, token_budget=0, rows=1, padded=True)]
    assert len(parts) == 3
    for other in (gradients(model, parts, task), gradients(model, [batch_of(layout="packed")], task, "packed")):
        for name, slope in whole.items():
            torch.testing.assert_close(other[name], slope, atol=1e-5, rtol=1e-4)
    assert max(float(slope.abs().max()) for slope in whole.values()) > 1e-3


def test_the_gradient_is_that_of_the_loss():
    model, batch, task = built(), batch_of(), Preference(beta=0.3)
    slopes = gradients(model, [batch], task)
    name, parameter = next((name, p) for name, p in model.bank.named_parameters() if "bias" in name)
    at, step = tuple(int(i) for i in (slopes[name].abs() == slopes[name].abs().max()).nonzero()[0]), 1e-2

    def loss_with(change):
        with torch.no_grad():
            parameter[at] += change
            model.bank.refresh()
            with model, model.editing(batch.rows):
                found = float(task.loss(model, batch))
            parameter[at] -= change
        return found

    slope = (loss_with(step) - loss_with(-step)) / (2 * step)
    assert slope == pytest.approx(float(slopes[name][at]), rel=2e-2)


def test_rewards_of_a_head():
    model = built("roberta")
    pairs = [
        Example(each.input_ids, each.prompt_length, 1, "", "a", each.row, rejected=each.rejected) for each in PAIRS
    ]
    batch = batch_of(pairs)
    head = model.base_model.classifier.out_proj
    with model, torch.no_grad(), model.editing(batch.rows):
        three = model.base_model(**batch.inputs).logits  # [6, 3]; a reward model has one output
        head.out_features, kept = 1, (head.weight, head.bias)
        head.weight, head.bias = (torch.nn.Parameter(each[:1]) for each in kept)
        try:
            found = Reward().rewards(model, batch)
        finally:
            head.weight, head.bias, head.out_features = *kept, 3
    torch.testing.assert_close(found, three[:, 0].view(2, 3).T)


def test_the_loss_of_pairs():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 1.0]])
    wanted = math.log1p(math.exp(-1)) + math.log(2) + math.log1p(math.exp(2))
    assert float(pair_loss(rewards)) == pytest.approx(wanted, rel=1e-6)


def test_the_objective_of_each_kind():
    assert task_of("preference", beta=0.2) == Preference(0.2) and task_of("reward") == Reward()
    assert pair_task_of("causal_lm", beta=None) is None and task_of("causal_lm").units(PAIRS[:1]) == 3
    assert Preference(0.1).units(PAIRS) == Reward().units(PAIRS) == 3
    assert Preference(0.1).can_pack and not Reward().can_pack
