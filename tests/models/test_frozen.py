"""What comes out of the blocks below the lowest edit can be kept and put in again; loss and gradients stay."""

from __future__ import annotations

import pytest
import torch

from reft_cli.models.build import build_intervened
from reft_cli.models.intervened import IntervenedModel
from reft_cli.positions import Positions
from tiny_models import DECODERS, base_of

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
ROWS = {"f1+l1": torch.tensor([0, 5, 6, 11])}


def intervened(family: str, component: str = "block_output", layers: str = "1") -> IntervenedModel:
    return build_intervened(
        base_of(family), method="loreft", layers=layers, component=component, positions=Positions.parse("f1+l1"),
        tied=True, rank=2, init="paper", dropout=0.0, dropout_on="delta", seed=0,
    ).train()  # fmt: skip


def found(model: IntervenedModel) -> list[torch.Tensor]:
    model.bank.refresh()
    with model.editing(ROWS):
        logits = model.base_model(input_ids=IDS, use_cache=False).logits
        logits.square().mean().backward()
    model.bank.backpropagate()
    gradients = [parameter.grad.clone() for parameter in model.bank.parameters()]
    model.bank.zero_grad()
    return [logits.detach(), *gradients]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("component", ["block_output", "block_input", "mlp_output"])
def test_nothing_changes(family: str, component: str):
    model = intervened(family, component)
    with model:
        with model.frozen.kept() as kept:
            whole = found(model)
        with model.frozen.replaced(kept[0]):
            torch.testing.assert_close(found(model), whole, rtol=0, atol=0)
        torch.testing.assert_close(found(model), whole, rtol=0, atol=0)
    model.eval()


def test_frozen_blocks_end_where_the_lowest_edit_begins():
    counts = [
        len(intervened("llama", component, layers).frozen.modules)
        for component, layers in (
            ("block_output", "0"),
            ("block_output", "1;2"),
            ("mlp_output", "1"),
            ("block_input", "0"),
        )
    ]
    assert counts == [1, 2, 1, 0]


def test_they_do_not_run_while_replaced():
    model, calls = intervened("llama"), []
    with model, model.base_model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1)):
        with model.frozen.kept() as kept:
            found(model)
        with model.frozen.replaced(kept[0]):
            found(model)
    model.eval()
    assert len(calls) == 1


def test_what_stood_in_a_block_comes_back():
    model = intervened("llama")
    block, own = model.base_model.model.layers[0], lambda *_, **__: None
    block.forward = own
    with model.frozen.replaced(torch.zeros(1)):
        assert block.forward is not own
    assert block.forward is own
    del block.forward
