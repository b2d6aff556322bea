"""How keys and values are written in messages and in resolved specs: always on one line, and readable again as YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from reft_cli.spec.scalars import Scalar

KeyPath = tuple[str | int, ...]

PLAIN = re.compile(r"[A-Za-z/_][\w./:+@-]*[\w/]|[A-Za-z/_]", re.ASCII)
# Readers of YAML 1.1 take these for something else than text, so they are quoted too.
NOT_TEXT = re.compile(r"y|n|yes|no|on|off|true|false|null", re.IGNORECASE)
ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
LONGEST = 60


def printable(text: str, *, limit: int = LONGEST) -> str:
    """Text for a message: control characters escaped, the end cut off when it is long."""
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(ch if ch.isprintable() else ESCAPES.get(ch, _escape(ch)) for ch in shown)


def dotted(path: KeyPath) -> str:
    """`train.seed`; list items are numbers."""
    return ".".join(printable(str(part)) or '""' for part in path)


def listed(words: Sequence[str], *, last: str = "or") -> str:
    """`a, b or c`."""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def yaml_text(text: str) -> str:
    """A string as YAML: plain where nobody can mistake it, else in double quotes, on one line."""
    if PLAIN.fullmatch(text) and not NOT_TEXT.fullmatch(text):
        return text
    shown = "".join(ESCAPES.get(ch) or (ch if ch.isprintable() and ch != "\ufeff" else _escape(ch)) for ch in text)
    return f'"{shown}"'


def yaml_inline(value: Scalar | Sequence[Scalar] | Mapping[str, Scalar]) -> str:
    """A scalar, a list or a mapping as YAML on one line, read alike by YAML 1.1 and 1.2."""
    if isinstance(value, str):
        return yaml_text(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{yaml_text(key)}: {yaml_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(yaml_inline, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))  # YAML 1.1 wants the point in 1.0e-05


def _escape(ch: str) -> str:
    code = ord(ch)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
