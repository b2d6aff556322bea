"""Rows drawn, divided, repeated and put together: shares, validation rows, mixes, rows set apart. Under a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from reft_cli.data.records import Rows
from reft_cli.errors import DataError


def draw(rows: Rows, *, share: str | float, seed: int, rest: bool = False) -> Rows:
    """Random rows in their order: a number of them, a fraction, or `glue`; with `rest` all others.

    glue: 1,000 of more than 5,000, else half, as the ReFT paper divides GLUE's validation rows. DataError: no row is
    left on one of the sides.
    """
    count = _count(len(rows), share)
    if not 0 < count < len(rows):
        raise DataError(f"{rows.name}: a share of {share} of {len(rows):,} rows leaves no row on one side")
    drawn = set(random.Random(seed).sample(range(len(rows)), count))
    return rows.take(index for index in range(len(rows)) if (index in drawn) != rest)


def split_off(rows: Rows, *, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """(training, validation) rows: a random `fraction` (0 to 1) is set apart, the same for the same seed."""
    if _count(len(rows), fraction) >= len(rows):
        count = "1 row" if len(rows) == 1 else f"{len(rows):,} rows"
        raise DataError(
            f"{rows.name}: {count} cannot be split into training rows and a validation fraction of {fraction:g}; "
            "give data.validation rows of its own"
        )
    return draw(rows, share=fraction, seed=seed, rest=True), draw(rows, share=fraction, seed=seed)


def repeat(rows: Rows, *, weight: float, seed: int) -> Rows:
    """Every row as often as the weight says; of what is less than once, a random part of the rows. At least one row."""
    whole, part = divmod(weight, 1)
    extra = round(part * len(rows))
    if not whole and not extra:
        extra = 1
    drawn = sorted(random.Random(seed).sample(range(len(rows)), extra))
    return rows.take([*range(len(rows))] * int(whole) + drawn)


def mix(parts: Sequence[tuple[str, Rows]]) -> Rows:
    """Rows of several sources one after the other; `parts` are the sources' names, no two alike, and their rows."""
    names = [name for name, rows in parts for _ in rows.rows]
    first, *others = (name for name, _ in parts)
    return Rows(
        name=first if not others else f"{first} and {len(others)} more",
        rows=[row for _, rows in parts for row in rows.rows],
        numbers=list(range(1, len(names) + 1)),
        places=[rows.where(index) for _, rows in parts for index in range(len(rows))],
        sources=names,
    )


def set_apart(rows: Rows, *, count: int, seed: int) -> tuple[Rows, Rows]:
    """(random rows, no two alike; all others but copies of them). DataError: there are not enough."""
    contents = [json.dumps(row, sort_keys=True, default=str) for row in rows.rows]
    first = {content: index for index, content in reversed([*enumerate(contents)])}
    if count >= len(first):
        raise DataError(f"{rows.name}: {count} solved rows for prompts leave none of {len(rows):,} to train on")
    chosen = random.Random(seed).sample(sorted(first.values()), count)
    apart = {contents[index] for index in chosen}
    return rows.take(chosen), rows.take(index for index, content in enumerate(contents) if content not in apart)


def _count(total: int, share: str | float) -> int:
    if share == "glue":
        return 1000 if total > 5000 else total // 2
    assert not isinstance(share, str), "glue is the only word"
    return share if isinstance(share, int) else max(1, round(total * share))
