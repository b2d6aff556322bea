"""Neighbouring linear layers as one product: the same outputs, the same weights afterwards, one product when traced."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear

from reft_cli.models.side_by_side import SideBySide, merge_same
from tiny_models import decoder

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize(("family", "laid"), [("llama", 5), ("qwen2", 5), ("gpt2", 0), ("phi3", 0), ("mixtral", 3)])
def test_logits_and_weights_stay(family: str, laid: int):
    model = deepcopy(decoder(family))
    wanted, before = model(IDS).logits, {name: each.clone() for name, each in model.state_dict().items()}
    neighbours = SideBySide(model, hooked=())
    assert len(neighbours._parts) == laid * 3  # layers of three blocks
    for _ in range(2):
        with neighbours.running():
            torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-5, atol=1e-6)
            assert model.state_dict().keys() == before.keys()
    assert torch.equal(model(IDS).logits, wanted)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_a_layer_beside_a_hooked_one_stays_alone():
    model = deepcopy(decoder("llama"))
    first, second, _ = model.model.layers
    assert len(SideBySide(model, hooked={first.self_attn.v_proj, second.mlp, second})._parts) == 3 * 5 - 3


def test_a_weight_changed_in_place_changes_the_whole():
    model = deepcopy(decoder("llama"))
    neighbours, layer = SideBySide(model, hooked=()), model.model.layers[0].self_attn.k_proj
    with torch.no_grad():
        layer.weight.mul_(2)
    wanted = model(IDS).logits
    with neighbours.running():
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-5, atol=1e-6)


def test_the_same_product_is_made_once():
    def parts(x, whole):
        return torch.cat([linear(x, whole)[..., start : start + 3] for start in (0, 3, 6)], -1)

    x, whole = torch.randn(3, 8), torch.randn(9, 8)
    traced = make_fx(parts)(x, whole)
    assert products(traced) == 3
    merge_same(traced.graph)
    traced.recompile()
    assert products(traced) == 1 and torch.equal(traced(x, whole), parts(x, whole))


def products(traced: torch.fx.GraphModule) -> int:
    return sum("mm" in str(node.target) for node in traced.graph.nodes)


def test_what_draws_or_writes_is_left_alone():
    def twice(x):
        return torch.rand_like(x) + torch.rand_like(x) + x.add_(1) + x.add_(1)

    traced = make_fx(twice)(torch.zeros(3))
    before = len(traced.graph.nodes)
    merge_same(traced.graph)
    assert len(traced.graph.nodes) == before


def test_what_writes_is_left_alone_also_where_its_arguments_are_the_same():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(tuple(graph.call_function(torch.ops.aten.add_.Scalar, (x, 1)) for _ in range(2)))
    merge_same(graph)
    assert len(graph.nodes) == 4
