"""What is written on one line is read back as the same value, by YAML 1.2 as by YAML 1.1."""

from __future__ import annotations

import yaml
from hypothesis import given
from hypothesis import strategies as st

from reft_cli.spec.quoting import dotted, listed, printable, yaml_inline
from reft_cli.spec.yaml_tree import Origin, read_tree

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [
        "yes",
        "No",
        "1e-4",
        "010",
        "1:30",
        "~",
        "",
        "null",
        "---",
        "...",
        "a: b",
        "a #b",
        "- a",
        "2026-01-02",
        "=",
        "<<",
        "a:",
    ]
)
scalars = texts | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none()
values = scalars | st.lists(scalars, max_size=4) | st.dictionaries(texts.filter(bool), scalars, max_size=4)


@given(values)
def test_round_trip(value):
    text = yaml_inline(value)
    assert "\n" not in text
    problems = []
    assert read_tree(f"key: {text}", source=Origin("x"), problems=problems).plain_value() == {"key": value}
    assert not problems
    assert yaml.safe_load(f"key: {text}") == {"key": value}


@given(st.text())
def test_printable_is_one_line(text):
    assert printable(text).isprintable()
    assert len(printable(text, limit=10)) <= 100


def test_words():
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b or c"
    assert dotted(("a", 0, "")) == 'a.0.""'
    assert printable("x" * 100).endswith("x…")
