"""The gradients of an edit, written out by hand, are those that autograd finds."""

from __future__ import annotations

import pytest
import torch

from reft_cli.interventions import METHODS, build_bank
from reft_cli.models.editing import RowEditor

B, T, D = 2, 5, 12
ROWS = torch.tensor([0, 3, 9])


def found(method: str, *, by_hand: bool, dtype: torch.dtype = torch.float32) -> list[torch.Tensor | None]:
    bank = build_bank(
        method, sites=2, width=D, rank=None if method == "red" else 3, init="paper", dropout=0.0, dropout_on="delta",
        generator=torch.Generator().manual_seed(0),
    ).train()  # fmt: skip
    bank.refresh()
    torch.manual_seed(1)
    h, upstream = torch.randn(B, T, D).to(dtype).requires_grad_(True), torch.randn(B, T, D).to(dtype)
    if by_hand:
        edited = RowEditor(bank)(h, ROWS, 1)
    else:
        flat = h.reshape(-1, D)
        before = flat.index_select(0, ROWS)
        edited = flat.index_copy(0, ROWS, (before + bank.delta(1, before)).to(dtype)).view_as(h)
    edited.backward(upstream)
    bank.backpropagate()
    return [edited.detach(), h.grad, *(parameter.grad for parameter in bank.parameters())]


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_autograd(method: str):
    torch.testing.assert_close(found(method, by_hand=True), found(method, by_hand=False))


@pytest.mark.parametrize("method", ["loreft", "red"])
def test_half_types_round_as_autograd_does(method: str):
    found_, expected = (found(method, by_hand=by_hand, dtype=torch.bfloat16) for by_hand in (True, False))
    torch.testing.assert_close(found_[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(found_[1:], expected[1:], rtol=1e-2, atol=1e-2)


def test_hidden_states_that_take_no_gradient_get_none():
    bank = build_bank("loreft", sites=1, width=D, rank=2, init="paper", dropout=0.0, dropout_on="delta",
                      generator=torch.Generator().manual_seed(0)).train()  # fmt: skip
    bank.refresh()
    RowEditor(bank)(torch.randn(B, T, D), ROWS, 0).sum().backward()
    bank.backpropagate()
    assert bank.source_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dropout_on", ["delta", "output"])
@pytest.mark.parametrize("method", METHODS)
def test_dropout_takes_numbers_of_the_edit_or_of_the_edited_row_and_doubles_the_others(method: str, dropout_on: str):
    bank = build_bank(
        method, sites=2, width=D, rank=None if method == "red" else 3, init="paper", dropout=0.5, dropout_on=dropout_on,
        generator=torch.Generator().manual_seed(0),
    ).train()  # fmt: skip
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter += torch.rand_like(parameter)
    torch.manual_seed(1)
    h = torch.randn(B, T, D)
    before, delta = h.view(-1, D)[ROWS], bank.fold().delta(1, h.view(-1, D)[ROWS])
    bank.refresh()
    edited = RowEditor(bank)(h, ROWS, 1).detach().view(-1, D)
    kept, dropped = (before + 2 * delta, before) if dropout_on == "delta" else (2 * (before + delta), 0 * before)
    is_kept, is_dropped = (torch.isclose(edited[ROWS], each, rtol=1e-4, atol=1e-5) for each in (kept, dropped))
    assert (is_kept ^ is_dropped).all() and 5 < is_kept.sum() < len(ROWS) * D - 5
    others = [row for row in range(B * T) if row not in ROWS.tolist()]
    assert torch.equal(edited[others], h.view(-1, D)[others])
