"""The chunked loss is the plain one, value and gradient, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from reft_cli.tasks import cross_entropy as chunked
from reft_cli.tasks.cross_entropy import linear_cross_entropy

K, D, V = 11, 6, 20


@pytest.mark.parametrize("chunk", [1, 4 * V, 1000 * V])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_loss_of_all_logits(chunk: int, biased: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    torch.manual_seed(0)
    weight, bias = torch.randn(V, D), torch.randn(V) if biased else None
    targets = torch.randint(V, (K,))
    targets[[2, 7]] = chunked.IGNORED
    found = []
    for whole in (True, False):
        torch.manual_seed(1)
        h = torch.randn(K, D, requires_grad=True)
        if whole:
            loss = cross_entropy(linear(h, weight, bias), targets, reduction="sum")
        else:
            loss = linear_cross_entropy(h, weight, bias, targets)
        (3 * loss).backward()
        found.append((loss.detach(), h.grad))
    torch.testing.assert_close(found[0], found[1])


def test_needs_no_gradient_to_give_a_loss():
    h, weight, targets = torch.randn(K, D), torch.randn(V, D), torch.randint(V, (K,))
    expected = cross_entropy(h @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(h, weight, None, targets), expected)


def test_large_logits_stay_finite():
    h, weight = torch.tensor([[200.0]], requires_grad=True), torch.tensor([[1.0], [-1.0], [0.5]])
    loss = linear_cross_entropy(h, weight, None, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(400)
    torch.testing.assert_close(h.grad, torch.tensor([[2.0]]))
