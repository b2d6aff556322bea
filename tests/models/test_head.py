"""A trained head's start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.functional import normalize

from reft_cli.errors import ModelError
from reft_cli.models.build import build_intervened
from reft_cli.models.loading import BaseSource, load_causal_lm, load_classifier
from reft_cli.positions import Positions
from tiny_models import config_of, decoder


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


def test_a_pooler_that_the_files_lack_is_part_of_the_head(tmp_path: Path):
    """It was random, frozen and in no checkpoint, so that `reft eval` scored another one than `reft train` had used."""
    transformers.BertForMaskedLM(config_of("bert")).save_pretrained(tmp_path)
    source = BaseSource(str(tmp_path), device="cpu", dtype="bfloat16")
    model = load_classifier(source, outputs=3, pad_token_id=1, seed=0).model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[0] for name in trained} == {"classifier", "bert.pooler.dense"}
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_pooler_that_is_there_stays_frozen(tmp_path: Path):
    transformers.BertModel(config_of("bert")).save_pretrained(tmp_path)
    model = load_classifier(BaseSource(str(tmp_path), device="cpu"), outputs=3, pad_token_id=1, seed=0).model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"classifier.weight", "classifier.bias"}


def test_weights_that_the_files_lack_are_not_made_up(tmp_path: Path):
    decoder("llama").model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"its files lack lm_head\.weight, and without trained ones it cannot write"):
        load_causal_lm(BaseSource(str(tmp_path), device="cpu"))
    config = config_of("llama")
    config.num_hidden_layers += 1
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"its files lack model\.layers\.3\.\S+ and 8 more, which are not"):
        load_classifier(BaseSource(str(tmp_path), device="cpu"), outputs=3, pad_token_id=1, seed=0)


@pytest.mark.parametrize(
    ("config", "causal", "said"),
    [
        (transformers.T5Config(), True, r"is an encoder-decoder, which is not supported; decoders \(Llama"),
        (transformers.T5Config(), False, r"is an encoder-decoder, which is not supported"),
        (config_of("deberta_v2"), True, r"this architecture does not write; for an encoder write task\.kind: class"),
        (transformers.CohereConfig(), False, r"no head for whole texts of this kind; task\.kind: causal_lm writes the"),
    ],
)
def test_an_architecture_that_cannot_do_the_task(tmp_path: Path, config, causal: bool, said: str):
    config.save_pretrained(tmp_path)
    source = BaseSource(str(tmp_path), device="cpu")
    with pytest.raises(ModelError, match=said):
        load_causal_lm(source) if causal else load_classifier(source, outputs=2, pad_token_id=1, seed=0)
