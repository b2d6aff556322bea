"""Choosing tokens: the processors are transformers' own, and a draw depends on nothing but its row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_decoding import GREEDY, PROMPTS, TOKENIZER, from_slots, intervened, prompt
from torch import Tensor
from transformers.generation import logits_process

from reft_cli.generation.choose import Chooser, ban_repeats, draw, highest, uniform
from reft_cli.generation.decode import Decoder, requests_of
from reft_cli.generation.settings import Answer, Decoding, Endings, Request
from reft_cli.positions import Positions

CPU = torch.device("cpu")
SAMPLED = Decoding(max_new_tokens=6, temperature=1.5, top_p=0.9, top_k=50, seed=5)


def rows(lengths: list[int], *, room: int = 12) -> tuple[Tensor, Tensor]:
    """Tokens 0 to 4 in rows of these lengths, with other ones behind them; and the lengths."""
    past = torch.randint(0, 5, (len(lengths), room), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(lengths):
        past[row, length:] = 7
    return past, torch.tensor(lengths)


@pytest.mark.parametrize("width", [1, 7, 64, 300, 512, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_highest_score_is_argmax_also_of_equal_ones(width: int, dtype: torch.dtype):
    scores = torch.randint(-3, 4, (50, width), generator=torch.Generator().manual_seed(0)).to(dtype)
    scores[0], scores[1, ::2] = float("-inf"), float("-inf")
    assert torch.equal(highest(scores), scores.argmax(-1))


@pytest.mark.parametrize("size", [1, 2, 3, 13])
def test_runs_are_banned_as_transformers_bans_them(size: int):
    past, held = rows([1, 2, 5, 9, 12])
    scores = torch.randn(5, 9)
    found = ban_repeats(scores, past, held, size=size)
    theirs = logits_process.NoRepeatNGramLogitsProcessor(size)
    for row, length in enumerate(held.tolist()):
        assert torch.equal(found[row], theirs(past[row : row + 1, :length], scores[row : row + 1].clone())[0])


def test_scores_are_those_of_transformers_processors():
    decoding = Decoding(
        temperature=0.7, top_k=6, top_p=0.8, repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=3
    )
    past, held = rows([3, 5, 12])
    logits, count = torch.randn(3, 20), torch.tensor([0, 2, 3])
    found = Chooser(decoding, ends={2, 11}, device=CPU).scores(logits, past=past, held=held, count=count)
    for row, (length, new) in enumerate(zip(held.tolist(), count.tolist(), strict=True)):
        ids, scores = past[row : row + 1, :length], logits[row : row + 1].clone()
        for theirs in (
            logits_process.RepetitionPenaltyLogitsProcessor(1.3),
            logits_process.NoRepeatNGramLogitsProcessor(2),
            logits_process.MinNewTokensLengthLogitsProcessor(length - new, 3, torch.tensor([2, 11])),
            logits_process.TemperatureLogitsWarper(0.7),
            logits_process.TopKLogitsWarper(6),
            logits_process.TopPLogitsWarper(0.8),
        ):
            scores = theirs(ids, scores)
        torch.testing.assert_close(found[row], scores[0])


def test_draws_have_the_probabilities_they_are_drawn_with():
    wanted = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    numbers = uniform(torch.arange(40_000) * 7919, torch.zeros(40_000, dtype=torch.long))
    shares = draw(wanted.expand(40_000, 5), numbers).bincount(minlength=5) / 40_000
    torch.testing.assert_close(shares, wanted, atol=0.01, rtol=0)
    assert shares[1] == shares[4] == 0
    later = uniform(torch.full((40_000,), 12345), torch.arange(40_000))  # one row, token after token
    torch.testing.assert_close(later.histc(10, 0, 1), torch.full((10,), 4000.0).double(), atol=200, rtol=0)


@given(st.floats(0, 1, exclude_max=True), st.lists(st.sampled_from([0.0, 1e-30, 0.3, 1.0]), min_size=1, max_size=6))
def test_what_has_no_probability_is_never_drawn(number: float, weights: list[float]):
    if not sum(weights) > 1e-20:
        return
    token = int(draw(torch.tensor([weights]), torch.tensor([number], dtype=torch.float64)))
    assert weights[token] > 0


def test_random_numbers_lie_below_one():
    extremes = torch.tensor([-(2**63), -1, 0, 1, 2**63 - 1])
    for count in (0, 1, 10**6):
        found = uniform(extremes, torch.full((5,), count))
        assert ((0 <= found) & (found < 1)).all() and len(set(found.tolist())) == 5


def decoder() -> Decoder:
    return Decoder.of(intervened(), Positions.parse("f3+l3").groups(tied=True), tokenizer=TOKENIZER)


def test_a_sampled_answer_does_not_depend_on_its_batch():
    serving, requests = decoder(), requests_of(PROMPTS, member=1)
    together = from_slots(serving, requests, SAMPLED)
    assert together == from_slots(serving, requests, SAMPLED, size=2)
    assert together == [from_slots(serving, [each], SAMPLED)[0] for each in requests]
    assert together != from_slots(serving, requests, replace(SAMPLED, seed=6))
    assert together[:2] != from_slots(serving, requests, replace(SAMPLED, temperature=0.0))[:2]


def test_several_answers_to_a_prompt_differ():
    requests = [Request(PROMPTS[3].input_ids, sample=sample) for sample in range(4)]
    found = from_slots(decoder(), requests, SAMPLED)
    assert len(set(map(tuple, found))) == 4


@pytest.mark.parametrize("change", [{"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 2}])
def test_the_past_counts_in_any_batch(change: dict):
    serving, decoding = decoder(), replace(GREEDY, max_new_tokens=14, **change)
    requests = requests_of([*PROMPTS, prompt(30, seed=4)], member=1)
    together = from_slots(serving, requests, decoding, size=3)
    plain = from_slots(serving, requests, replace(GREEDY, max_new_tokens=14), size=3)
    assert together != plain
    for request, found in zip(requests, together, strict=True):
        whole = decoding_whole(serving, request, decoding)
        assert found == whole[: len(found)]


def decoding_whole(serving: Decoder, request: Request, decoding: Decoding) -> list[int]:
    """What transformers' generate makes of the one prompt."""
    from reft_cli.generation.whole import generate

    return generate(serving.model, serving.stack, [request], tokenizer=TOKENIZER, decoding=decoding)[0]


def test_shortest_answers():
    serving = decoder()
    first = from_slots(serving, requests_of(PROMPTS, member=1), GREEDY)
    end = first[2][0]
    ends = Endings(frozenset({end}), (), TOKENIZER)
    assert ends.answer(first[2]).tokens == 0
    serving.model.generation_config.eos_token_id = [end]
    try:
        longer = from_slots(serving, requests_of(PROMPTS, member=1), replace(GREEDY, min_new_tokens=3))
    finally:
        serving.model.generation_config.eos_token_id = 0
    assert all(end not in answer[:3] and len(answer) >= 3 for answer in longer)


def test_what_was_generated_after_a_stop_text_or_an_end_does_not_count():
    endings = Endings(frozenset({0}), ("stop", "end"), TOKENIZER)
    for text, kept, count in (("a stop, the end", "a ", 6), ("the end. stop", "the ", 7), ("stop", "", 4)):
        assert endings.answer(TOKENIZER.encode(text)) == Answer(kept, count, True)
    tokens = TOKENIZER.encode("ab")
    assert endings.answer([*tokens, 0, *TOKENIZER.encode("c stop")]) == Answer("ab", 2, True)
    assert endings.answer(tokens) == Answer("ab", 2, False)


def test_a_stop_text_is_seen_when_it_is_completed_and_not_again():
    endings, tokens = Endings(frozenset(), ("stop",), TOKENIZER), TOKENIZER.encode("a stop")
    assert endings.stopped(tokens, new=1) and endings.stopped([*tokens, 9, 9], new=3)
    assert not endings.stopped(tokens[:-1], new=5) and not endings.stopped(tokens, new=0)
    assert not endings.stopped([*tokens, *[9] * 20], new=1)


def test_an_answer_ends_with_the_token_that_completes_a_stop_text():
    serving = decoder()
    endings = Endings(frozenset({0}), (), TOKENIZER)
    for request in requests_of(PROMPTS, member=1):
        whole = from_slots(serving, [request], replace(GREEDY, max_new_tokens=20))[0]
        text = endings.answer(whole).text
        for start in range(1, len(text) - 3, 2):
            stop = text[start : start + 2]
            decoding = replace(GREEDY, max_new_tokens=20, stop=("never comes", stop))
            serving._slots = None  # its count of steps begins anew
            found = dict(serving.answers([request], decoding=decoding, batch_size=1))[0]
            assert found.text == text[: text.index(stop)] and found.finished
            assert TOKENIZER.decode(whole[: found.tokens], skip_special_tokens=True).find(stop) >= 0
            assert TOKENIZER.decode(whole[: found.tokens - 1], skip_special_tokens=True).find(stop) < 0
            assert serving._slots is not None and serving._slots.steps <= found.tokens
