"""The hard end of learned positions is known to the token; other families have none."""

from __future__ import annotations

import pytest
import torch

from reft_cli.models.context import longest_sequence
from tiny_models import DECODERS, ENCODERS, base_of

WITH_A_TABLE = ("gpt2", "opt", *ENCODERS)


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_the_longest_sequence_runs_and_one_token_more_does_not(family: str):
    model = base_of(family).model
    longest = longest_sequence(model)
    assert (longest is not None) == (family in WITH_A_TABLE)
    with torch.no_grad():
        model(input_ids=torch.full((1, longest or 300), 5))
        if longest is not None:
            assert longest == 128
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, longest + 1), 5))
