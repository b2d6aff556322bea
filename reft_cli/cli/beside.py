"""Data that are missing where reft was started, and lie beside the spec that names them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from reft_cli.errors import DataError


@contextmanager
def looking_beside(spec: Path) -> Iterator[None]:
    """Inside, the error of a missing file says where it is, if it lies beside the spec."""
    from reft_cli.data.records import NoSuchFile

    try:
        yield
    except NoSuchFile as error:
        beside = spec.parent / error.given
        if not error.given or not beside.exists():
            raise
        hint = f"Paths count from where reft is started, and there is {beside}; start it in {spec.parent}"
        raise DataError(replace(error.problems[0], hint=hint)) from error
