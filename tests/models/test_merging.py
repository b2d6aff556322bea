"""A merged intervention is the hooked one, and leaves no trace in the weights."""

from __future__ import annotations

import pytest
import torch
from tiny_decoding import intervened

from reft_cli.models.intervened import IntervenedModel
from reft_cli.models.merging import Merge, find_merge
from reft_cli.models.stacked import Live, Member, Stack
from reft_cli.positions import Positions

IDS = torch.tensor([[3, 17, 200, 45, 9, 80], [8, 8, 30, 2, 100, 11]])
METHODS = ("loreft", "noreft", "direft", "direft_orthogonal", "consreft", "lobireft", "red")


def member_of(model: IntervenedModel, positions: str = "all") -> Member:
    return Member.of(model, Positions.parse(positions).groups(tied=True))


def merge_of(model: IntervenedModel) -> Merge:
    found = find_merge(model.base_model, member_of(model))
    assert found is not None
    return found


@torch.no_grad()
def hooked(model: IntervenedModel) -> torch.Tensor:
    stack = Stack(model.base_model, [member_of(model)])
    with stack.hooked():
        stack.live = Live(None, torch.ones(IDS.numel(), dtype=torch.long))
        return model.base_model(IDS).logits


@torch.no_grad()
def agrees(model: IntervenedModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}
    plain, edited = model.base_model(IDS).logits, hooked(model)
    with merge_of(model).merged():
        torch.testing.assert_close(model.base_model(IDS).logits, edited, rtol=1e-5, atol=1e-5)
    assert (edited - plain).abs().max() > 1e-2
    after = model.base_model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("component", ["mlp_output", "attention_output"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges(method: str, component: str):
    agrees(intervened("all", method=method, component=component))


@pytest.mark.parametrize("component", ["mlp_output", "attention_output"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "gemma3", "qwen3", "phi3"])
def test_families_merge_with_biases_and_without(family: str, component: str):
    agrees(intervened("all", family=family, component=component, layers="0;2"))


@pytest.mark.parametrize(
    ("positions", "options"),
    [
        ("prompt", {"component": "mlp_output"}),
        ("generated", {"component": "mlp_output"}),
        ("f3+l3", {"component": "mlp_output"}),
        ("all", {"component": "block_output"}),
        ("all", {"component": "mlp_activation"}),
        ("all", {"component": "mlp_output", "family": "mixtral", "layers": "1"}),  # its experts are no one linear layer
    ],
)
def test_what_would_not_be_exact_is_not_merged(positions: str, options: dict):
    model = intervened(positions, **options)
    assert find_merge(model.base_model, member_of(model, positions)) is None


def test_the_weights_come_back_when_something_fails():
    model = intervened("all", component="mlp_output")
    weight = model.base_model.model.layers[0].mlp.down_proj
    before = weight.weight.clone()
    with pytest.raises(ZeroDivisionError), merge_of(model).merged():
        assert not torch.equal(weight.weight, before)
        raise ZeroDivisionError
    assert torch.equal(weight.weight, before) and weight.bias is None
