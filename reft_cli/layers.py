"""Which blocks are edited, `all`, a list, or text such as `0-15/2` and `4;6;10`; and where in a block, by name."""

from __future__ import annotations

import re

COMPONENTS = ("block_input", "block_output", "attention_output", "mlp_output", "mlp_activation")
RANGE = re.compile(r"(\d+)(?:-(\d+)(?:/([1-9]\d*))?)?")


def parse_layers(layers: str | list[int]) -> tuple[int, ...] | None:
    """The layer numbers in rising order; None for `all`. ValueError says what can be written.

    `4;6;10` and `4,6,10` are lists, `0-15` a range that includes both ends, `0-15/2` every second one of it.
    """
    if layers == "all":
        return None
    numbers: list[int] = []
    if isinstance(layers, str):
        for part in re.split(r"[;,]", layers.replace(" ", "")):
            match = RANGE.fullmatch(part)
            if match is None:
                raise ValueError(f"`{layers}` names no layers; write all, [4, 6, 10], 4;6;10, 0-15 or 0-15/2")
            start = int(match[1])
            stop = int(match[2] or start)
            if stop < start:
                raise ValueError(f"the range `{part}` runs backwards")
            numbers += range(start, stop + 1, int(match[3] or 1))
    else:
        numbers = list(layers)
    if not numbers:
        raise ValueError("no layer is named; write all, [4, 6, 10], 4;6;10, 0-15 or 0-15/2")
    if min(numbers) < 0:
        raise ValueError(f"layer {min(numbers)} is negative; layers are counted from 0")
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        raise ValueError(f"layer {twice[0]} is named twice")
    return tuple(sorted(numbers))
