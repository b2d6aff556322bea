"""Parity with the PyPI release of pyreft 0.1.0, on the tensors that scripts/make_goldens.py recorded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reft_cli.interventions import METHODS
from reft_cli.interventions.frames import orthonormal_rows
from reft_cli.positions import Positions

FIXTURES = Path(__file__).parents[1] / "fixtures"
TENSORS = load_file(FIXTURES / "pyreft_goldens.safetensors")
FACTS = json.loads((FIXTURES / "pyreft_goldens.json").read_text())
CLASSES = {  # by class, since pyreft and the paper use the name DiReFT differently
    "Loreft": "loreft",
    "Noreft": "noreft",
    "Nodireft": "direft",
    "Direft": "direft_orthogonal",
    "Consreft": "consreft",
    "Lobireft": "lobireft",
}
# Ours sums in another order (folded) and orthonormalises R again; both are errors of a few float32 epsilons (1.2e-7)
# of numbers up to 4 in outputs, 30 in gradients.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}
GRADIENT_TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


def golden(name):
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in TENSORS.items() if key.startswith(f"{name}/")}


def bank_of(name, **dropout):
    """Our bank of one site with pyreft's weights; a frame may have any length of rows, so take half."""
    given = golden(name)
    rows = given["R"].T / 2 if "R" in given else given["W2"]
    bank = METHODS[CLASSES[name]](sites=1, width=rows.shape[1], rank=rows.shape[0], **dropout)
    state = {"projection": rows, "source_bias": given["b"]} | ({"source_weight": given["W"]} if "W" in given else {})
    bank.load_state_dict({key: tensor[None] for key, tensor in state.items()})
    bank.refresh()
    return bank, given


def test_every_class_of_pyreft_is_there():
    assert set(CLASSES) == set(FACTS["classes"])
    assert FACTS["versions"]["pyreft"] == "0.1.0"


@pytest.mark.parametrize("name", CLASSES)
def test_outputs(name):
    bank, given = bank_of(name)
    h = given["h"].flatten(0, 1)
    torch.testing.assert_close(h + bank.delta(0, h), given["output"].flatten(0, 1), **TOLERANCE)


@pytest.mark.parametrize("name", CLASSES)
def test_gradients(name):
    bank, given = bank_of(name)
    h = given["h"].flatten(0, 1).requires_grad_()
    (h + bank.delta(0, h) - given["y"].flatten(0, 1)).square().sum().div(2).backward()
    bank.backpropagate()
    assert h.grad is not None
    torch.testing.assert_close(h.grad, given["gradient_h"].flatten(0, 1), **GRADIENT_TOLERANCE)
    torch.testing.assert_close(bank.source_bias.grad[0], given["gradient_b"], **GRADIENT_TOLERANCE)
    if "W" in given:
        torch.testing.assert_close(bank.source_weight.grad[0], given["gradient_W"], **GRADIENT_TOLERANCE)
    if "W2" in given:
        torch.testing.assert_close(bank.projection.grad[0], given["gradient_W2"], **GRADIENT_TOLERANCE)
    else:  # two charts of the same frame: compare where ours maps pyreft's gradient with respect to R itself
        weight = bank.projection.detach().clone().requires_grad_()
        orthonormal_rows(weight).backward(given["gradient_R"].T[None])
        torch.testing.assert_close(bank.projection.grad, weight.grad, **GRADIENT_TOLERANCE)


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"Consreft"}))
def test_dropout_on_output(name):
    """pyreft's dropout zeroes entries of the edited state and scales up the others; the mask is drawn elsewhere."""
    bank, given = bank_of(name, dropout=FACTS["dropout"], dropout_on="output")
    h, expected = given["h"].flatten(0, 1), given["dropped"].flatten(0, 1)
    torch.manual_seed(FACTS["seed"])
    ours = h + bank.delta(0, h)
    both = (expected != 0) & (ours.abs() > 1e-6)
    assert both.sum() > 30
    torch.testing.assert_close(ours[both], expected[both], **TOLERANCE)
    for values in (ours.abs() > 1e-6, expected != 0):
        assert 0.35 < values.float().mean() < 0.65


@pytest.mark.parametrize("tied", [True, False])
def test_positions(tied):
    """Equal where the prompt has room, n ≥ 2 max(f, l), or is even and crowded from both sides, n ≤ 2 min(f, l).

    pyreft never gives a side more than floor(n/2) tokens. Ours gives the suffix ceil(n/2), and to a side whatever the
    other does not ask for; so we edit what pyreft edits, and more in short prompts.
    """
    equal = more = 0
    for row in FACTS["locations"]:
        if row["share_weights"] is not tied:
            continue
        n, positions = row["prompt_length"], Positions.parse(row["positions"])
        groups = positions.groups(tied=tied)
        theirs = [[p for p in locations if p >= 0] for locations in row["locations"][: len(groups)]]
        ours = [group.indices(n, n) for group in groups]
        roomy = n >= 2 * max(positions.first, positions.last)
        if roomy or (n % 2 == 0 and n <= 2 * min(positions.first, positions.last)):
            assert ours == theirs, (row, ours)
            equal += 1
        else:
            assert all(set(t) <= set(o) for t, o in zip(theirs, ours, strict=True)), (row, ours)
            more += 1
    assert equal > 100
    assert more > 30
