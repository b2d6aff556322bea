"""Positions, anchors and limits of the YAML reader."""

from __future__ import annotations

import pytest

from reft_cli.errors import SpecError
from reft_cli.spec.yaml_tree import DEEPEST, LARGEST, Origin, read_tree


def read(text):
    problems = []
    root = read_tree(text, source=Origin("x.yaml"), problems=problems)
    return root, [str(problem) for problem in problems]


def place(origin):
    return origin.line, origin.column


def test_places_of_keys_items_and_values():
    root, _ = read("a:\n  b: [1,\n    two]\n")
    inner = root.child("a").child("b")
    assert place(root.child("a").at) == (1, 1)
    assert place(inner.at) == (2, 3)
    assert place(inner.start) == (2, 6)
    assert place(inner.child(1).at) == (3, 5)
    assert inner.child(2) is None
    assert root.child(0) is None


def test_anchors_and_aliases():
    root, problems = read("a: &x {k: [1, 2]}\nb: *x\nc: &x 3\nd: *x\n")
    assert root.plain_value() == {"a": {"k": [1, 2]}, "b": {"k": [1, 2]}, "c": 3, "d": 3}
    assert place(root.child("b").at) == (2, 1)
    assert place(root.child("b").child("k").at) == (1, 8)  # where it is written
    assert not problems


def test_an_anchor_that_is_closed_inside_itself_can_be_used():
    assert read("a: &x [&x 1, *x]")[0].plain_value() == {"a": [1, 1]}


def test_keys_are_text():
    assert read("1: a\ntrue: b\nnull: c\n'<<': d\n")[0].plain_value() == {"1": "a", "true": "b", "null": "c", "<<": "d"}


def test_the_first_of_two_keys_stays():
    root, problems = read("a: 1\nb: {c: 1, c: 2}\na: 2\n")
    assert root.plain_value() == {"a": 1, "b": {"c": 1}}
    assert problems == [
        "x.yaml:2:11: b.c: key given twice (first on line 2)",
        "x.yaml:3:1: a: key given twice (first on line 1)",
    ]


def test_block_text_line_ends_and_comments():
    root, _ = read("a: |\n  one\n  two\r\nb: >-\n  one\n  two\nc: 'x' # no\n")
    assert root.plain_value() == {"a": "one\ntwo\n", "b": "one two", "c": "x"}


def billion_laughs(width, height):
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, height)]
    return "\n".join(lines)


@pytest.mark.parametrize("text", [billion_laughs(9, 9), billion_laughs(2, 18), billion_laughs(150, 3)])
def test_alias_bombs(text):
    with pytest.raises(SpecError, match=rf"more than {LARGEST:,} values, with every alias written out"):
        read(text)


def test_an_alias_chain_cannot_nest_deeper_than_brackets():
    with pytest.raises(SpecError, match="levels deep, with every alias written out"):
        read(billion_laughs(1, 60))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "- " * 50_000,
        '{"a":' * 50_000,
        "a: " + "[" * 100_000,
        "\n".join(" " * i + "a:" for i in range(500)),
    ],
)
def test_deep_nesting(text):
    with pytest.raises(SpecError, match=f"nested more than {DEEPEST} levels deep") as caught:
        read(text)
    assert caught.value.problems[0].line


def test_the_deepest_tree_that_is_allowed():
    assert read("[" * (DEEPEST - 1) + "1" + "]" * (DEEPEST - 1))[0].depth == DEEPEST


def test_a_flag_has_no_lines():
    problems = []
    read_tree("{a: 1, a: 2}", source=Origin(flag="--set x={a: 1, a: 2}"), problems=problems)
    assert [str(problem) for problem in problems] == ["--set x={a: 1, a: 2}: a: key given twice"]
