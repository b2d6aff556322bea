"""What is decayed, and that every parameter has a gradient."""

from __future__ import annotations

import pytest
import torch

from reft_cli.models.build import build_intervened
from reft_cli.models.intervened import IntervenedModel
from reft_cli.positions import Positions
from reft_cli.training.optimizer import all_gradients, build_optimizer, trainable_parameters
from tiny_models import base_of


def intervened(method: str) -> IntervenedModel:
    return build_intervened(
        base_of("roberta"), method=method, layers="all", component="block_output", positions=Positions.parse("f1"),
        tied=True, rank=None if method == "red" else 2, init="paper", dropout=0.0, dropout_on="delta", seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(("method", "decayed"), [("loreft", {"bank.source_weight"}), ("red", set())])
def test_the_head_s_matrices_are_decayed_and_of_the_bank_what_may_be(method: str, decayed: set[str]):
    model = intervened(method)
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.3)
    decays = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    found = {name: decays.pop(id(parameter)) for name, parameter in trainable_parameters(model).items()}
    decayed = decayed | {"head.classifier.dense.weight", "head.classifier.out_proj.weight"}
    assert not decays and found == {name: 0.3 if name in decayed else 0.0 for name in found}


def test_a_process_without_rows_has_gradients_of_zeros():
    """In the order in which all processes add them up; the bank's are there already."""
    model = intervened("loreft").train()
    model.bank.refresh()
    model.bank.backpropagate()
    parameters = list(trainable_parameters(model).values())
    for gradient, parameter in zip(all_gradients(model), parameters, strict=True):
        assert gradient is parameter.grad and torch.equal(gradient, torch.zeros_like(parameter))
        parameter.grad = None
    model.eval()
