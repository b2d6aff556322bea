"""Layers as they are written: lists, ranges with both ends, and what is refused."""

from __future__ import annotations

import pytest

from reft_cli.layers import parse_layers


@pytest.mark.parametrize(
    ("written", "numbers"),
    [
        ("all", None),
        ("3", (3,)),
        ("0-3", (0, 1, 2, 3)),
        ("5-5", (5,)),
        ("2-11/3", (2, 5, 8, 11)),
        ("2-10/3", (2, 5, 8)),
        ("10;4;6", (4, 6, 10)),
        (" 12, 0 - 2;7 ", (0, 1, 2, 7, 12)),
        ([10, 4, 0], (0, 4, 10)),
    ],
)
def test_layers_come_in_rising_order(written: str | list[int], numbers: tuple[int, ...] | None):
    assert parse_layers(written) == numbers


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("3-2", "^the range `3-2` runs backwards$"),
        ("0-4/0", "^`0-4/0` names no layers; write all, "),
        ("4;;6", "^`4;;6` names no layers; "),
        ("-1", "^`-1` names no layers; "),
        ("first", "^`first` names no layers; "),
        ([], "^no layer is named; write all, "),
        ([3, -1, -2], "^layer -2 is negative; layers are counted from 0$"),
        ("0-4;6;2", "^layer 2 is named twice$"),
    ],
)
def test_what_names_no_layers_is_refused(written: str | list[int], said: str):
    with pytest.raises(ValueError, match=said):
        parse_layers(written)
