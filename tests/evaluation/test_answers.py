"""Kept answers: found again by settings, model and prompt, whatever a kill left of the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_decoding import GREEDY, PROMPTS, TOKENIZER, intervened

from reft_cli.evaluation.answers import AnswerStore, answer_all, answer_store
from reft_cli.generation.decode import Decoder, requests_of
from reft_cli.generation.settings import Answer, Request
from reft_cli.positions import Positions

ANSWER = Answer("as “it” is\n\u2028 \x85", 3, True)  # at the last two `str.splitlines` breaks too


def test_an_answer_is_known_by_what_decides_it(tmp_path: Path):
    request = Request([5, 6, 7])
    store = AnswerStore(tmp_path / "a.jsonl", settings="greedy")
    store.add(request, ANSWER)
    again = AnswerStore(tmp_path / "a.jsonl", settings="greedy")  # while the other one is open, as after a kill
    store.close()
    assert again.known[again.key(request)] == ANSWER
    for other in (replace(request, member=0), replace(request, sample=1), replace(request, prompt=[5, 6])):
        assert again.key(other) not in again.known
    assert AnswerStore(tmp_path / "a.jsonl", settings="sampled").key(request) not in again.known


def test_a_torn_line_is_taken_off(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    store = AnswerStore(path, settings="")
    store.add(Request([1]), ANSWER)
    store.close()
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + whole[:20], encoding="utf-8")
    again = AnswerStore(path, settings="")
    again.add(Request([2]), ANSWER)
    again.close()
    assert len(AnswerStore(path, settings="").known) == 2


def test_the_file_goes_when_all_went_well_and_only_then(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(ZeroDivisionError), answer_store(path, settings="") as store:
        assert store is not None
        store.add(Request([1]), ANSWER)
        raise ZeroDivisionError
    assert path.exists()
    with answer_store(path, settings="") as store:
        assert store is not None and len(store.known) == 1
    assert not path.exists()
    with answer_store(None, settings="") as store:
        assert store is None


def test_only_what_is_missing_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    decoder = Decoder.of(intervened(), Positions.parse("f3+l3").groups(tied=True), tokenizer=TOKENIZER)
    requests = requests_of(PROMPTS, member=1)
    wanted = answer_all(decoder, requests, decoding=GREEDY, batch_size=2)
    asked: list[int] = []
    plain = decoder.answers

    def answers(some: list[Request], **settings: object) -> object:
        asked.append(len(some))
        return plain(some, **settings)

    monkeypatch.setattr(decoder, "answers", answers)
    with answer_store(tmp_path / "a.jsonl", settings="") as store:
        told: list[int] = []
        args = {"decoding": GREEDY, "batch_size": 2, "store": store, "on_progress": told.append}
        assert answer_all(decoder, requests[1:3], **args) == wanted[1:3]
        assert answer_all(decoder, requests, **args) == wanted
    assert asked == [2, 3] and told == [1, 2, 3, 4, 5]
