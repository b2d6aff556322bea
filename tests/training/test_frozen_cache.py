"""Batches whose frozen activations are kept train as if every block ran."""

from __future__ import annotations

import pytest
import torch

from reft_cli.data.batch import Batch, build_batch
from reft_cli.data.capacity import fill
from reft_cli.data.examples import Example, Examples
from reft_cli.models.build import build_intervened
from reft_cli.models.intervened import IntervenedModel
from reft_cli.positions import Positions
from reft_cli.tasks.objectives import TASKS
from reft_cli.training.frozen_cache import CachedPasses, why_not_cached
from reft_cli.training.passes import PlainPasses
from tiny_models import base_of

POSITIONS = Positions.parse("f2+l2")
CHANCE = torch.Generator().manual_seed(0)
ROWS = Examples.of(
    Example(torch.randint(5, 200, (6 + row,), generator=CHANCE).tolist(), 4, None, "", "", row) for row in range(6)
)


def intervened(layers: str = "1;2") -> IntervenedModel:
    return build_intervened(
        base_of("llama"), method="loreft", layers=layers, component="block_output", positions=POSITIONS, tied=True,
        rank=2, init="paper", dropout=0.0, dropout_on="delta", seed=0,
    ).train()  # fmt: skip


def batch(*chosen: int) -> Batch:
    return build_batch(ROWS.take(chosen), groups=POSITIONS.groups(tied=True), layout="packed", pad_token_id=1)


@pytest.mark.parametrize("filled", [False, True])
def test_known_tokens_skip_the_frozen_blocks_and_nothing_changes(filled: bool):
    model, ran = intervened(), []
    plain = PlainPasses(model, TASKS["causal_lm"], torch.amp.GradScaler("cpu", enabled=False))
    cached = CachedPasses(plain, plain, tokens=len(ROWS.tokens))

    def found(passes: PlainPasses | CachedPasses, of: Batch) -> list[torch.Tensor]:
        model.bank.refresh()
        loss = passes(fill(of, pad_token_id=1) if filled else of, units=10)
        model.bank.backpropagate()
        gradients = [parameter.grad.clone() for parameter in model.bank.parameters()]
        model.bank.zero_grad()
        return [loss, *gradients]

    # seen: three rows, then others with one of them (all run), then any of those known
    batches = [batch(0, 3, 5), batch(1, 3, 4), batch(5, 1), batch(2, 0), batch(0, 1, 2, 3, 4, 5)]
    with model, model.packing(True):
        expected = [found(plain, each) for each in batches]
        with model.base_model.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append(len(ran))):
            for index, each in enumerate(batches):
                before = len(ran)
                torch.testing.assert_close(found(cached, each), expected[index], rtol=1e-5, atol=1e-6)
                assert (len(ran) - before == 0) == (index in (2, 4))
    model.eval()


def test_reasons():
    given = {"tokens": 10, "packed": True, "repeated": True, "processes": 1, "dropout": False}
    model = intervened()
    assert why_not_cached(model, **given) is None
    assert why_not_cached(intervened("0"), **given) == "only 1 of 3 blocks lie below the lowest edit"
    assert why_not_cached(model, **given | {"repeated": False}) == "no row is seen twice"
    assert why_not_cached(model, **given | {"packed": False}) == "batches are padded"
    assert why_not_cached(model, **given | {"dropout": True}) == "the base's dropout is on"
    assert why_not_cached(model, **given | {"processes": 2}) == "each process sees other rows in every epoch"
