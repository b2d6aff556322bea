"""Labels: names of classes to numbers, and numbers of a regression."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from reft_cli.data.formats import as_text
from reft_cli.errors import DataError


def class_name(value: Any, *, where: str) -> str:  # noqa: ANN401  whatever stood in the file
    """A label as the name of a class: texts as they are, 3 and 3.0 as `3`, truth values as `true` and `false`."""
    if isinstance(value, float) and not value.is_integer():
        raise DataError(
            f"{where}: label {value!r} is a number between classes; for numbers write task.kind: regression"
        )
    text = as_text(int(value) if isinstance(value, float) else value)
    if text is None or not text:
        raise DataError(f"{where}: a label is a text or a whole number, this is {value!r}")
    return text


def find_classes(values: Iterable[Any], *, places: Sequence[str], name: str) -> tuple[str, ...]:
    """Names of the classes in training data: sorted, whole numbers by their size. DataError for fewer than two."""
    names = {class_name(value, where=where) for value, where in zip(values, places, strict=True)}
    if len(names) < 2:
        raise DataError(f"{name}: all labels are `{next(iter(names))}`; a classification needs two classes or more")
    numeric = all(each.removeprefix("-").isdecimal() for each in names)
    return tuple(sorted(names, key=int) if numeric else sorted(names))


def class_number(value: Any, classes: Sequence[str], *, where: str, given: bool) -> int:  # noqa: ANN401
    """The number of a label's class. `given`: the names stand in task.labels, and a number may stand for the k-th."""
    name = class_name(value, where=where)
    if name in classes:
        return classes.index(name)
    number = int(value) if isinstance(value, bool) else int(name) if name.isdecimal() else -1
    if given and 0 <= number < len(classes):
        return number
    known = ", ".join(classes[:12]) + (", …" if len(classes) > 12 else "")
    origin = "task.labels" if given else "the training data"
    raise DataError(f"{where}: label `{name}` is not a class of {origin} ({known})")


def number(value: Any, *, where: str) -> float:  # noqa: ANN401  whatever stood in the file
    """The label of a regression; DataError for anything but a finite number."""
    try:
        found = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f"{where}: label {value!r} is not a finite number, as task.kind regression needs")
    return found
