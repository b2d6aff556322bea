"""A decoder's tokens see only those before them; an encoder that loads as one is found out."""

from __future__ import annotations

import pytest
import torch
import transformers

from reft_cli.models.causality import sees_ahead
from tiny_models import DECODERS, config_of, decoder


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_do_not_see_ahead(family: str):
    assert not sees_ahead(decoder(family))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_does_unless_it_is_set_up_as_a_decoder(dtype: torch.dtype):
    config = config_of("bert")
    assert sees_ahead(transformers.BertLMHeadModel(config).eval().to(dtype))
    config.is_decoder = True
    assert not sees_ahead(transformers.BertLMHeadModel(config).eval().to(dtype))


def test_what_is_not_a_number_is_no_sign_of_it():
    model = transformers.AutoModelForCausalLM.from_config(config_of("llama")).eval()
    model.lm_head.weight.data.fill_(torch.nan)
    assert not sees_ahead(model)
