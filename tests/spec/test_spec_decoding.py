"""`--set generation.key=value` beside a trained run: what it gives, and what it says when it cannot be."""

from __future__ import annotations

import pytest

from reft_cli.errors import SpecError
from reft_cli.spec.decoding import generation_keys


def test_the_keys_that_are_given_and_no_others():
    flags = ["generation.beams=4", 'generation.stop=["\\n", " and"]', "generation.repetition_penalty=1.3"]
    assert generation_keys(flags) == {"beams": 4, "stop": ["\n", " and"], "repetition_penalty": 1.3}
    assert generation_keys([]) == {}


def test_what_is_sampled_from_is_judged_beside_the_temperature_of_the_run():
    assert generation_keys(["generation.top_k=4"]) == {"top_k": 4}


def test_the_last_one_wins():
    assert generation_keys(["generation.beams=4", "generation.beams=2"]) == {"beams": 2}


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("beams=4", "a trained run takes keys of generation only, such as generation.beams=4"),
        ("train.epochs=4", "a trained run takes keys of generation only, such as generation.beams=4"),
        ("generation=4", "a trained run takes keys of generation only, such as generation.beams=4"),
        ("generation.beems=4", "generation.beems: unknown key"),
        ("generation.beams=0", "generation.beams"),
        ("generation.beams", "write it as key.path=value"),
        ("generation.stop=[a", "generation.stop"),
    ],
)
def test_what_cannot_be_is_said_with_its_flag(flag: str, said: str):
    with pytest.raises(SpecError) as caught:
        generation_keys([flag])
    (text,) = map(str, caught.value.problems)
    assert said in text and f"--set {flag.partition('=')[0]}" in text


def test_a_key_without_its_section_is_met_with_the_right_words():
    with pytest.raises(SpecError) as caught:
        generation_keys(["beams=4"])
    assert caught.value.problems[0].hint == "write --set generation.beams=4"


def test_all_problems_are_told_at_once():
    with pytest.raises(SpecError) as caught:
        generation_keys(["generation.beems=4", "generation.top_p=2"])
    assert len(caught.value.problems) == 2
