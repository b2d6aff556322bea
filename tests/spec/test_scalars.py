"""YAML 1.2 scalars, beside what YAML 1.1 makes of them."""

from __future__ import annotations

import math

import pytest

from reft_cli.spec.scalars import read_scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),  # PyYAML: text
        ("1E+3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0.0", -0.0),
        ("010", 10),  # PyYAML: 8
        ("+7", 7),
        ("0o17", 15),
        ("0xFf", 255),
        ("no", "no"),  # PyYAML: False
        ("on", "on"),
        ("Yes", "Yes"),
        ("1:30", "1:30"),  # PyYAML: 90
        ("1_000", "1_000"),  # PyYAML: 1000
        ("0b11", "0b11"),  # PyYAML: 3
        ("2026-01-02", "2026-01-02"),  # PyYAML: a date
        ("0o8", "0o8"),
        ("-0x1", "-0x1"),
        ("true", True),
        ("FALSE", False),
        ("tRUE", "tRUE"),
        ("", None),
        ("~", None),
        ("NULL", None),
        ("nUll", "nUll"),
        ("none", "none"),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("1e999", math.inf),
        ("inf", "inf"),
        ("nan", "nan"),
        (".", "."),
        ("-", "-"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("٣", "٣"),  # a digit, but not of YAML
        ("1\n", "1\n"),
    ],
)
def test_core_schema(text, value):
    assert read_scalar(text) == value
    assert type(read_scalar(text)) is type(value)


def test_nan():
    assert math.isnan(read_scalar(".nan"))


def test_digits_without_end_are_no_integer():
    """Python would raise on 4,301 decimal digits, on reading as on printing."""
    assert read_scalar("9" * 5000) == math.inf
    assert read_scalar("0x" + "f" * 5000) == "0x" + "f" * 5000
    assert str(read_scalar("0x" + "f" * 1000))
