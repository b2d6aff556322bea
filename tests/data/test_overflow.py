"""Cuts of long rows; what becomes of all rows of a file is in test_encode."""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reft_cli.data.examples import Example
from reft_cli.data.overflow import cut_middle


@given(
    prompt=st.integers(0, 40),
    answer=st.integers(0, 12),
    first=st.integers(0, 12),
    last=st.integers(0, 12),
    max_length=st.integers(8, 40),
)
@settings(max_examples=500, deadline=None)
def test_cutting_keeps_both_ends_and_the_answer(prompt: int, answer: int, first: int, last: int, max_length: int):
    ids = list(range(prompt + answer))
    assume(len(ids) > max_length)
    cut = cut_middle(Example(ids, prompt, None, "", "", 1), max_length=max_length, first=first, last=last)
    if cut is None:
        assert answer + max(first + last, 1) > max_length
        return
    kept = cut.input_ids[: cut.prompt_length]
    assert len(cut.input_ids) == max_length and cut.input_ids[cut.prompt_length :] == ids[prompt:]
    assert kept[:first] == ids[:first] and kept[len(kept) - last :] == ids[prompt - last : prompt]
    head = next((at for at, token in enumerate(kept) if token != at), len(kept))
    assert kept[head:] == ids[prompt - (len(kept) - head) : prompt]
    assert abs(len(kept) - 2 * head) <= 1 or head in (first, len(kept) - last)
