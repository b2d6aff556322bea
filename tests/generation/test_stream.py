"""Pieces of an answer, joined, are the answer: whatever the tokenizer, and wherever a stop text lies."""

from __future__ import annotations

import random
from itertools import pairwise
from threading import Thread

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from reft_cli.generation.stream import TextPieces, cut_at, stop_at
from reft_cli.models.loading import BaseSource, load_tokenizer
from small_tokenizers import KINDS
from tiny_models import byte_tokenizer

TOKENIZERS = KINDS | {"bytes": byte_tokenizer, "bundled": lambda: load_tokenizer(BaseSource("bundled:tiny-llama"))}


def pieces(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> list[str]:
    """What comes out for these new tokens after a prompt."""
    streamer = TextPieces(tokenizer, ends={tokenizer.eos_token_id})
    streamer.put(torch.tensor([[5, 6, 7]]))
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return list(streamer)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_of_any_tokens_are_their_text(name: str):
    tokenizer, draw = TOKENIZERS[name](), random.Random(0)
    several = 0
    for _ in range(300):
        tokens = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(14))]
        kept = [token for token in tokens if token != tokenizer.eos_token_id]
        found = pieces(tokenizer, tokens)
        assert "".join(found) == tokenizer.decode(kept, skip_special_tokens=True)
        assert all(found)
        several += len(found) > 1
    assert several > 150


@pytest.mark.parametrize("text", ["\n  indented\n\n    more", "日本語 🙂🙃 ünïcode", "a\tb  c", " naïve café"])
@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name.startswith(("byte", "bundled"))])
def test_pieces_of_a_text_are_the_text(name: str, text: str):
    tokenizer = TOKENIZERS[name]()
    tokens = tokenizer("Start:" + text, add_special_tokens=False).input_ids
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_characters_are_told_as_soon_as_they_are_whole():
    tokens = byte_tokenizer()("aé🙂b").input_ids
    assert pieces(byte_tokenizer(), tokens) == ["a", "é", "🙂", "b"]
    assert pieces(byte_tokenizer(), tokens[:-2]) == ["a", "é", "\N{REPLACEMENT CHARACTER}"]


def test_end_tokens_are_no_text_even_if_they_are_not_special():
    tokenizer = byte_tokenizer()
    end = tokenizer("!").input_ids[0]
    streamer = TextPieces(tokenizer, ends={end})
    for token in (7, *tokenizer("yes!").input_ids):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(streamer) == "yes"


def test_another_thread_can_read_along():
    streamer, found = TextPieces(byte_tokenizer(), ends=()), []
    reader = Thread(target=lambda: found.extend(streamer))
    reader.start()
    for token in (7, *byte_tokenizer()("hello").input_ids):
        streamer.put(torch.tensor([token]))
    streamer.end()
    reader.join(10)
    assert "".join(found) == "hello"


TEXTS = st.text("ab\n", max_size=20)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@given(text=TEXTS, stops=STOPS, cuts=st.lists(st.integers(0, 20), max_size=8))
@example(text="abba", stops=["abc", "b"], cuts=[1, 2])
@example(text="aab", stops=["ab"], cuts=[1, 2])  # the beginning of a stop that is none, then one
def test_a_text_in_any_pieces_is_cut_at_the_same_place(text: str, stops: list[str], cuts: list[int]):
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[start:stop] for start, stop in pairwise(bounds)]
    assert "".join(cut_at(parts, stops)) == text[: stop_at(text, stops)]


@given(text=TEXTS, stops=STOPS)
def test_the_first_stop_to_be_whole_cuts(text: str, stops: list[str]):
    """By growing the text a character at a time, as a slow tokenizer would."""
    expected = None
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            expected = min(starts)
            break
    assert stop_at(text, stops) == expected


def test_text_that_begins_no_stop_is_not_held_back():
    assert list(cut_at(["ab", "c", "d"], ["cx"])) == ["ab", "cd"]
    assert list(cut_at(["one", "\n", "\ntwo"], ["\n\n"])) == ["one"]
    assert list(cut_at(["", "stop"], ["stop"])) == []


def test_what_comes_after_a_stop_is_read_to_its_end():
    rest = iter(["a", "stop", "b", "c"])
    assert "".join(cut_at(rest, ["stop"])) == "a"
    assert list(rest) == []
