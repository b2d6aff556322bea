"""Cached decoding equals a full recomputation with the same edits, alone and in any batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_decoding import GREEDY, POSITIONS, PROMPTS, TOKENIZER, intervened, prompt, recomputed, step_logits, tokens

from reft_cli.data.encode import Example
from reft_cli.errors import ModelError
from reft_cli.generation import decode
from reft_cli.generation.decode import Decoder, requests_of
from reft_cli.generation.settings import Answer, Decoding, Request
from reft_cli.models import compiling
from reft_cli.models.intervened import IntervenedModel
from reft_cli.positions import Positions
from tiny_models import base_of, byte_tokenizer


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


def test_the_best_beams_are_several_answers_of_one_search(monkeypatch: pytest.MonkeyPatch):
    model, beams, calls = intervened("all"), replace(GREEDY, beams=3, max_new_tokens=4, min_new_tokens=4), []
    search = decode.generate
    monkeypatch.setattr(decode, "generate", lambda *given, **how: calls.append(len(given[2])) or search(*given, **how))
    decoder = Decoder.of(model, Positions.parse("all").groups(tied=True), tokenizer=TOKENIZER)
    requests = [Request(each.input_ids, sample=sample) for each in PROMPTS[2:] for sample in (0, 1, 2)]
    found = list(decoder.progress(requests, decoding=beams, batch_size=2))
    (alone,) = decoder.progress(requests[:1], decoding=beams, batch_size=2)
    assert calls == [2, 1, 1] and [each.index for each in found] == list(range(9))
    assert found[0].tokens == alone.tokens
    for example, start in zip(PROMPTS[2:], (0, 3, 6), strict=True):
        three = [each.tokens for each in found[start : start + 3]]
        likely = [likelihood(model, example, "all", each) for each in three]
        assert len({tuple(each) for each in three}) == 3 and likely == sorted(likely, reverse=True)


def likelihood(model: IntervenedModel, prompt: Example, positions: str, answer: list[int]) -> float:
    """Log-probability of an answer, each token read with all before it."""
    ids = list(prompt.input_ids)
    steps = [
        step_logits(model, ids + answer[:count], len(ids), positions).log_softmax(-1)[token]
        for count, token in enumerate(answer)
    ]
    return float(torch.stack(steps).sum())


def answers(decoder: Decoder, prompts: list[Example], decoding: Decoding, *, member: int = 1) -> list[Answer]:
    found = dict(decoder.answers(requests_of(prompts, member=member), decoding=decoding, batch_size=2))
    return [found[index] for index in range(len(prompts))]


def decoder_of(positions: str = "f3+l3") -> Decoder:
    return Decoder.of(intervened(positions), Positions.parse(positions).groups(tied=True), tokenizer=TOKENIZER)


def test_the_edit_changes_answers_and_the_base_is_the_base():
    edited = answers(decoder_of(), PROMPTS, GREEDY)
    base = answers(decoder_of(), PROMPTS, GREEDY, member=0)
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


@pytest.mark.parametrize("use_cache", [True, False])
def test_stop_text_is_cut_off_and_min_new_tokens_kept(use_cache: bool):
    greedy = replace(GREEDY, use_cache=use_cache)
    whole = answers(decoder_of(), PROMPTS[4:], greedy)[0]
    stop = whole.text[2:4]
    cut = answers(decoder_of(), PROMPTS[4:], replace(greedy, stop=(stop,)))[0]
    longer = answers(decoder_of(), PROMPTS, replace(greedy, min_new_tokens=8))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finished
    assert [each.tokens for each in longer] == [8] * 5


@pytest.mark.parametrize("decoding", [GREEDY, replace(GREEDY, use_cache=False), replace(GREEDY, beams=2)])
def test_a_streamed_answer_is_the_answer(decoding: Decoding):
    decoder = decoder_of("all")
    for each in PROMPTS:
        request = requests_of([each], member=1)[0]
        assert "".join(decoder.stream(request, decoding=decoding)) == answers(decoder, [each], decoding)[0].text


@pytest.mark.parametrize("way", ["slots", "whole"])
def test_padding_is_not_the_end_though_they_are_one_token(way: str):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    decoder = Decoder(decoder_of().model, decoder_of().stack, tokenizer=tokenizer)
    decoding = replace(GREEDY, use_cache=way == "slots")
    assert answers(decoder, PROMPTS, decoding) == answers(decoder_of(), PROMPTS, decoding)


def test_answers_come_in_order_though_they_are_done_out_of_it():
    decoder = decoder_of()
    asked = [prompt(3 + 7 * index % 30, seed=index) for index in range(12)]
    done = [number for number, _ in decoder.answers(requests_of(asked, member=1), decoding=GREEDY, batch_size=4)]
    assert done != sorted(done)
    found = list(decoder.in_order(requests_of(asked, member=1), decoding=GREEDY, batch_size=4))
    assert found == answers(decoder, asked, GREEDY)
    assert list(decoder.in_order([], decoding=GREEDY, batch_size=4)) == []


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_stream_that_is_closed_stops_the_decoding(use_cache: bool):
    decoder, asked = decoder_of(), requests_of([prompt(5)], member=1)[0]
    decoding = Decoding(max_new_tokens=100, min_new_tokens=100, use_cache=use_cache)
    passes: list[int] = []
    with decoder.model.register_forward_hook(lambda *_: passes.append(1)):
        decoder.why_not_slots(decoding)
        passes.clear()
        stream = decoder.stream(asked, decoding=decoding)
        next(stream)
        stream.close()
        assert len(passes) < 90
    answer = answers(decoder, PROMPTS[2:3], GREEDY)[0]
    assert "".join(decoder.stream(requests_of(PROMPTS[2:3], member=1)[0], decoding=GREEDY)) == answer.text


# ---- compiling

MANY = replace(GREEDY, max_new_tokens=100)


@pytest.mark.parametrize(
    ("decoding", "steps", "compiles"),
    [
        (MANY, 30_000, True),
        (MANY, 29_900, False),
        (replace(MANY, compile="off"), 10**6, False),
        (replace(MANY, compile="on"), 1, True),
    ],
)
def test_many_steps_to_come_are_compiled(
    decoding: Decoding, steps: int, compiles: bool, monkeypatch: pytest.MonkeyPatch
):
    decoder = Decoder.of(intervened(), Positions.parse("f3+l3").groups(tied=True), tokenizer=TOKENIZER)
    assert decoder._compiles(decoding, steps=steps) == (decoding.compile == "on")  # a CPU compiles if told to
    monkeypatch.setattr(type(decoder.model), "device", torch.device("cuda"))
    monkeypatch.setattr(compiling, "has_triton", lambda: True)
    assert decoder._compiles(decoding, steps=steps) == compiles
    monkeypatch.setattr(compiling, "has_triton", lambda: False)
    if decoding.compile == "on":
        with pytest.raises(ModelError, match=r"^generation\.compile: on is not possible: Triton is not"):
            decoder._compiles(decoding, steps=steps)
    else:
        assert not decoder._compiles(decoding, steps=steps)


def test_weights_of_few_bits_are_compiled_only_if_told_to(monkeypatch: pytest.MonkeyPatch):
    decoder = Decoder.of(intervened(), Positions.parse("f3+l3").groups(tied=True), tokenizer=TOKENIZER)
    monkeypatch.setattr(type(decoder.model), "device", torch.device("cuda"))
    monkeypatch.setattr(compiling, "has_triton", lambda: True)
    monkeypatch.setattr(decoder.model, "parameters", lambda: iter([torch.zeros(2), torch.zeros(2, dtype=torch.int8)]))
    assert not decoder._compiles(MANY, steps=10**6)
    assert decoder._compiles(replace(MANY, compile="on"), steps=1)


def test_requests_are_counted_in_rounds_of_slots(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    decoder = Decoder.of(intervened(), Positions.parse("f3+l3").groups(tied=True), tokenizer=TOKENIZER)
    monkeypatch.setattr(Decoder, "_compiles", lambda self, decoding, *, steps: bool(asked.append(steps)))
    list(decoder.progress(requests_of(PROMPTS, member=1), decoding=GREEDY, batch_size=2))
    assert asked == [3 * 8]  # five prompts in two slots
