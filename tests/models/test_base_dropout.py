"""The base's own dropout is off however it is called, and what its files say where `model.dropout` asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from reft_cli.models.loading import BaseSource, load_causal_lm, load_classifier
from tiny_models import config_of

RATES = {
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "gpt2": ("embd_pdrop", "attn_pdrop", "resid_pdrop"),
    "opt": ("dropout", "attention_dropout", "layerdrop"),
}
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@torch.no_grad()
def logits(family: str, path: Path, *, dropout: bool, training: bool) -> tuple[torch.Tensor, set[float]]:
    """What a loaded model says, and the rates of its dropout layers."""
    source = BaseSource(str(path), device="cpu", dtype="float32", dropout=dropout)
    classifies = family == "bert"
    base = load_classifier(source, outputs=2, pad_token_id=1, seed=0) if classifies else load_causal_lm(source)
    rates = {module.p for module in base.model.modules() if isinstance(module, nn.Dropout)}
    torch.manual_seed(3)
    return base.model.train(training)(input_ids=IDS).logits, rates


@pytest.mark.parametrize("family", RATES)
def test_training_draws_nothing_unless_dropout_is_asked_for(tmp_path: Path, family: str):
    config = config_of(family)
    for name in RATES[family]:
        assert hasattr(config, name)
        setattr(config, name, 0.3)
    whole = transformers.AutoModelForSequenceClassification if family == "bert" else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    whole.from_config(config).save_pretrained(tmp_path)
    still, rates = logits(family, tmp_path, dropout=False, training=False)
    assert rates <= {0.0} and torch.equal(logits(family, tmp_path, dropout=False, training=True)[0], still)
    drawn, rates = logits(family, tmp_path, dropout=True, training=True)
    assert rates <= {0.3} and not torch.allclose(drawn, still)
    assert torch.equal(logits(family, tmp_path, dropout=True, training=False)[0], still)
