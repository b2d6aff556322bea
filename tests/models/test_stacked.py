"""A stack: each row's delta is its owner's own, and rows of the base keep every bit."""

from __future__ import annotations

import pytest
import torch
from tiny_decoding import intervened

from reft_cli.models.stacked import BASE, Live, Member, Stack, edit_rows
from reft_cli.positions import Positions
from tiny_models import decoder

KINDS = (("f1+l1", {"rank": 3}), ("all", {"method": "red"}), ("prompt", {"rank": 5, "layers": "1", "method": "direft"}))


def stack() -> Stack:
    members = [
        Member.of(intervened(positions, seed=seed, **options), Positions.parse(positions).groups(tied=True))
        for seed, (positions, options) in enumerate(KINDS)
    ]
    return Stack(decoder("llama"), members)


def test_deltas_are_those_of_the_owner_s_folded_form():
    together, h = stack(), torch.randn(8, 32)
    owners = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    for target, place in together._places:
        found = place.edited(h.double(), Live(None, owners), alone=False, edit=edit_rows) - h
        layer = int(target.path.split(".")[-1])
        for row, owner in enumerate(owners.tolist()):
            wanted = torch.zeros(32)
            member = together.members[owner - 1] if owner else None
            sites = [] if member is None else [at for at, site in enumerate(member.sites) if site.layer == layer]
            if member is not None and sites:
                wanted = member.folded.delta(sites[0], h[row : row + 1])[0]
            torch.testing.assert_close(found[row], wanted.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_an_owner_are_not_touched(dtype: torch.dtype):
    together, h = stack(), torch.randn(6, 32, dtype=dtype)
    for _, place in together._places:
        live = Live(None, torch.zeros(6, dtype=torch.long))
        assert torch.equal(place.edited(h, live, alone=False, edit=edit_rows), h)


def test_the_one_owner_s_rows_need_no_mask():
    alone = Stack(decoder("llama"), [stack().members[0]])
    h, live = torch.randn(2, 4, 32), Live(torch.tensor([1, 3, 6]), torch.tensor([1, 1, 1]))
    for _, place in alone._places:
        wanted, found = (place.edited(h, live, alone=each, edit=edit_rows) for each in (False, True))
        assert torch.equal(found, wanted) and not torch.equal(found, h)


def test_rows_of_prompts_and_owners_of_new_tokens():
    together = stack()
    live = together.prompt_rows([3, 2, 1, 2], [1, 0, 2, 3], [0, 3, 5, 6])
    assert live is not None and live.rows is not None
    assert dict(zip(live.rows.tolist(), live.owners.tolist(), strict=True)) == {0: 1, 2: 1, 5: 2, 6: 3, 7: 3}
    assert [together.owner_of_new_tokens(member) for member in range(4)] == [BASE, BASE, 2, BASE]
    assert together.prompt_rows([4], [0], [0]) is None


def test_nothing_is_edited_outside_and_no_hook_is_left():
    together, model = stack(), decoder("llama")
    ids = torch.tensor([[5, 6, 7]])
    plain = model(ids).logits
    with together.hooked():
        assert torch.equal(model(ids).logits, plain)
        together.live = Live(None, torch.full((3,), 2))
        assert not torch.allclose(model(ids).logits, plain)
    assert together.live is None and torch.equal(model(ids).logits, plain)
