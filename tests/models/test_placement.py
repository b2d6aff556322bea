"""A base laid out over several devices: the logits and gradients of one that lies on one; disk stands in for GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reft_cli.models.build import build_intervened
from reft_cli.models.intervened import IntervenedModel
from reft_cli.models.loading import BaseSource, load_causal_lm
from reft_cli.models.packing import packing_inputs, why_not_packed
from reft_cli.models.placement import (
    devices_of,
    entry_device,
    is_offloaded,
    is_spread,
    places_of,
    size_of,
    spreading,
    summary,
)
from reft_cli.positions import Positions

NAME = "bundled:tiny-llama"
HALF = {"cpu": "16MB"}  # four of six blocks stay on disk


def built(**given: object) -> IntervenedModel:
    base = load_causal_lm(BaseSource(NAME, device="cpu", **given))
    return build_intervened(
        base, method="loreft", layers="all", component="block_output", positions=Positions.parse("f2+l2"), tied=True,
        rank=4, init="paper", dropout=0.0, dropout_on="delta", seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "size"), [("20GiB", 20 * 2**30), ("1.5GB", 1_500_000_000), ("7KB", 7000), ("3MiB", 3 * 2**20)]
)
def test_sizes_are_read(text: str, size: int):
    assert size_of(text) == size


def test_limits_are_those_of_the_spec_and_a_cpu_takes_no_gpu():
    assert spreading(torch.device("cuda"), None) == {"device_map": "auto", "max_memory": None}
    assert spreading(torch.device("cuda"), {"0": "1GiB", "cpu": "2GiB"})["max_memory"] == {0: 2**30, "cpu": 2**31}
    assert list(spreading(torch.device("cpu"), None)["max_memory"]) == ["cpu"]


def test_places_of_made_up_maps():
    model = nn.Linear(1, 1)
    assert places_of(model) == {} and not is_spread(model) and devices_of(model) == [torch.device("cpu")]
    model.hf_device_map = {"embed": 1, "layers.0": 1, "layers.1": 0, "layers.2.mlp": 0, "layers.2.attn": "cpu"}
    assert is_spread(model) and summary(model, "layers", 3) == {"cuda:1": 1, "cuda:0": 1, "cpu and cuda:0": 1}
    assert devices_of(model) == [torch.device("cuda:1"), torch.device("cuda:0")]
    assert entry_device(model) == torch.device("cuda:1")
    model.hf_device_map = {"embed": "cpu", "layers": "disk"}
    assert summary(model, "layers", 3) == {"disk": 3} and devices_of(model) == [torch.device("cpu")]


def test_a_small_base_is_not_spread():
    model = built(device_map="auto").base_model
    assert not is_spread(model) and not is_offloaded(model)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_a_whole_base(packed: bool, checkpointing: bool):
    whole, spread = built(), built(device_map="auto", max_memory=HALF)
    assert spread.places == {"cpu": 2, "disk": 4} and is_offloaded(spread.base_model) and not whole.places
    assert spread.devices == [torch.device("cpu")]
    ids = torch.arange(20, 37)[None]
    extra = packing_inputs([8, 9]) if packed else {}
    rows = {"edited": torch.tensor([0, 1, 6, 7, 8, 9])}
    rows = {site.group: rows["edited"] for site in whole.sites}
    answers = torch.tensor([5, 7, 12, 16])
    found = []
    for model in (whole, spread):
        model.checkpoint_activations(checkpointing)
        with model.train(), model.packing(packed), model.editing(rows):
            model.bank.refresh()
            logits = model.logits_at({"input_ids": ids, **extra}, answers)
            logits.square().mean().backward()
            model.bank.backpropagate()
        found.append((logits.detach(), [parameter.grad for parameter in model.bank.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert any(gradient.any() for gradient in found[0][1])
    assert is_offloaded(spread.base_model)  # again


def test_it_is_packed_and_its_head_used_as_of_a_whole_base():
    spread = built(device_map="auto", max_memory=HALF)
    assert why_not_packed(spread.base_model) is None and spread.linear_head is not None
