"""Cached decoding equals a full recomputation with the same edits, alone and in any batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_decoding import GREEDY, POSITIONS, PROMPTS, TOKENIZER, intervened, recomputed, tokens

from reft_cli.generation.decode import decode_all
from reft_cli.positions import Positions
from tiny_models import base_of


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_whole_batches_equal_recomputation(positions: str, use_cache: bool):
    model = intervened(positions)
    batched = tokens(model, PROMPTS, positions, replace(GREEDY, use_cache=use_cache), way="whole")
    for example, found in zip(PROMPTS, batched, strict=True):
        assert found == recomputed(model, example, positions, 8)[: len(found)]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_slots_equal_recomputation_whatever_stands_beside(positions: str, size: int):
    model = intervened(positions)
    batched = tokens(model, PROMPTS, positions, GREEDY, size=size)
    for example, found in zip(PROMPTS, batched, strict=True):
        assert found == recomputed(model, example, positions, 8)[: len(found)]


@pytest.mark.parametrize(
    "family", ["mistral", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "opt", "mixtral"]
)
def test_families_decode_as_they_recompute(family: str):
    model = intervened(family=family)
    batched = tokens(model, PROMPTS, "f3+l3", GREEDY, way="whole" if family == "gemma2" else "slots")
    for example, found in zip(PROMPTS, batched, strict=True):
        assert found == recomputed(model, example, "f3+l3", 8)[: len(found)]


@pytest.mark.parametrize("component", ["block_input", "attention_output", "mlp_output", "mlp_activation"])
@pytest.mark.parametrize("method", ["noreft", "red"])
def test_components_decode_as_they_recompute(component: str, method: str):
    model = intervened("all", method=method, component=component)
    batched = tokens(model, PROMPTS[2:], "all", GREEDY)
    for example, found in zip(PROMPTS[2:], batched, strict=True):
        assert found == recomputed(model, example, "all", 8)[: len(found)]


@pytest.mark.parametrize("positions", ["f3+l3", "all"])
def test_beams_equal_beams_without_a_cache(positions: str):
    model = intervened(positions)
    beams = replace(GREEDY, beams=3)
    assert tokens(model, PROMPTS, positions, beams, way="whole") == tokens(
        model, PROMPTS, positions, replace(beams, use_cache=False), way="whole"
    )


def test_the_edit_changes_answers_and_the_base_is_the_base():
    model = intervened()
    groups = Positions.parse("f3+l3").groups(tied=True)
    args = {"groups": groups, "tokenizer": TOKENIZER, "decoding": GREEDY, "batch_size": 2}
    with model:
        edited = decode_all(model, PROMPTS, **args)
        base = decode_all(model, PROMPTS, edited=False, **args)
    plain = [
        TOKENIZER.decode(
            base_of("llama").model.generate(
                torch.tensor([each.input_ids]), max_new_tokens=8, do_sample=False, pad_token_id=1
            )[0, len(each.input_ids) :],
            skip_special_tokens=True,
        )
        for each in PROMPTS
    ]
    assert [each.text for each in base] == plain
    assert [each.text for each in edited] != plain


def test_stop_text_is_cut_off_and_min_new_tokens_kept():
    model = intervened()
    args = {"groups": Positions.parse("f3+l3").groups(tied=True), "tokenizer": TOKENIZER, "batch_size": 2}
    with model:
        whole = decode_all(model, PROMPTS[4:], decoding=GREEDY, **args)[0]
        stop = whole.text[2:4]
        cut = decode_all(model, PROMPTS[4:], decoding=replace(GREEDY, stop=(stop,)), **args)[0]
        longer = decode_all(model, PROMPTS, decoding=replace(GREEDY, min_new_tokens=8), **args)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finished
    assert [each.tokens for each in longer] == [8] * 5
