"""A trained head's start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from reft_cli.models.build import build_intervened
from reft_cli.models.loading import BaseSource, load_classifier
from reft_cli.positions import Positions


@pytest.mark.parametrize("seed", [0, 42])
def test_the_head_and_the_bank_start_from_different_draws(tiny_llama: Path, seed: int):
    """One generator's numbers for both made the head's rows those of the first frame, times a factor."""
    base = load_classifier(BaseSource(str(tiny_llama), device="cpu"), outputs=3, pad_token_id=1, seed=seed)
    model = build_intervened(
        base, method="loreft", layers="all", component="block_output", positions=Positions.parse("f2"), tied=True,
        rank=3, init="paper", dropout=0.0, dropout_on="delta", seed=seed,
    )  # fmt: skip
    (head,) = (parameter.detach() for parameter in model.head_parameters().values())
    rows = model.bank.projection.detach().flatten(0, 1)
    assert (normalize(head, dim=1) @ normalize(rows, dim=1).T).abs().max() < 0.8


def test_a_seed_is_a_heads_start(tiny_llama: Path):
    heads = [
        load_classifier(BaseSource(str(tiny_llama), device="cpu"), outputs=3, pad_token_id=1, seed=seed).model.score
        for seed in (5, 5, 6)
    ]
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)
