"""YAML 1.2 core scalars: what unquoted text means.

`1e-4` is a float, `010` is ten, `0o17` and `0xf` are fifteen; `no`, `on`, `yes` and `1:30` are text.
"""

from __future__ import annotations

import re

Scalar = str | int | float | bool | None

WORDS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{sign + name: float(sign + "inf") for sign in ("", "+", "-") for name in (".inf", ".Inf", ".INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
# At most 1,000 digits: Python refuses to read or print longer decimal numbers.
DECIMAL = re.compile(r"[-+]?[0-9]{1,1000}")
OCTAL = re.compile(r"0o[0-7]{1,1000}")
HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]{1,1000}")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def read_scalar(text: str) -> Scalar:
    """The value of a plain scalar; text that is nothing else stays text."""
    if text in WORDS:
        return WORDS[text]
    if DECIMAL.fullmatch(text):
        return int(text)
    if OCTAL.fullmatch(text):
        return int(text[2:], 8)
    if HEXADECIMAL.fullmatch(text):
        return int(text[2:], 16)
    if FLOAT.fullmatch(text):
        return float(text)
    return text
