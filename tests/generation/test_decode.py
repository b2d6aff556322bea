"""Cached decoding equals a full recomputation with the same edits, alone and in any batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reft_cli.data.encode import Example
from reft_cli.generation.decode import Decoder, decode_all, requests_of
from reft_cli.generation.settings import Decoding
from reft_cli.generation.whole import generate
from reft_cli.models.build import build_intervened
from reft_cli.models.intervened import IntervenedModel
from reft_cli.positions import Positions
from tiny_models import base_of, byte_tokenizer

TOKENIZER = byte_tokenizer()
GREEDY = Decoding(max_new_tokens=8)
POSITIONS = ("f3+l3", "l1", "prompt", "generated", "all")


def prompt(length: int, *, seed: int = 0) -> Example:
    ids = [(11 * token + 5 * length + seed) % 290 + 2 for token in range(length)]
    return Example(ids, length, None, "", "", 1)


PROMPTS = [prompt(length) for length in (1, 2, 3, 7, 12)]


def intervened(
    positions: str = "f3+l3", *, family: str = "llama", method: str = "loreft", component: str = "block_output"
) -> IntervenedModel:
    model = build_intervened(
        base_of(family),
        method=method,
        layers="all",
        component=component,
        positions=Positions.parse(positions),
        tied=True,
        rank=None if method == "red" else 2,
        init="paper",
        dropout=0.0,
        dropout_on="delta",
        seed=0,
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter += torch.randn_like(parameter)
    return model.eval()


def recomputed(model: IntervenedModel, example: Example, positions: str, steps: int) -> list[int]:
    """Greedy decoding that runs the whole sequence, unpadded and with its edits, for every token."""
    ids, new = list(example.input_ids), []
    groups = Positions.parse(positions).groups(tied=True)
    for _ in range(steps):
        rows = {group.name: torch.tensor(group.indices(example.prompt_length, len(ids))) for group in groups}
        rows = {name: each.long() for name, each in rows.items()}
        with torch.no_grad(), model, model.editing(rows):
            logits = model.base_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        new.append(int(logits.argmax()))
        ids.append(new[-1])
        if new[-1] == 0:
            break
    return new


def tokens(
    model: IntervenedModel,
    prompts: list[Example],
    positions: str,
    decoding: Decoding,
    *,
    way: str = "slots",
    size: int = 9,
) -> list[list[int]]:
    """New tokens of each prompt up to its end, by one of the two ways."""
    decoder = Decoder.of(model, Positions.parse(positions).groups(tied=True), tokenizer=TOKENIZER)
    requests = requests_of(prompts, member=1)
    if way == "slots":
        assert decoder.why_not_slots(decoding) is None
        progress = decoder.progress(requests, decoding=decoding, batch_size=size)
        done = {each.index: each.tokens for each in progress if each.done}
        found = [done[index] for index in range(len(prompts))]
    else:
        found = generate(model.base_model, decoder.stack, requests, tokenizer=TOKENIZER, decoding=decoding)
    return [row[: row.index(0) + 1] if 0 in row else row for row in found]


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


def test_sampling_follows_its_seed():
    model = intervened()
    sampled = Decoding(max_new_tokens=6, temperature=1.5, top_p=0.9, top_k=50, seed=5)
    runs = [tokens(model, PROMPTS, "f3+l3", each) for each in (sampled, sampled, replace(sampled, seed=6))]
    assert runs[0] == runs[1] != runs[2]


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
