"""Imports of torch and transformers, which the garbage collector would make a third longer."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

VERBS = "reft_cli.runs"  # with them come torch and transformers


@contextmanager
def importing() -> Iterator[None]:
    """What is imported in here for the first time stays: the collector neither runs meanwhile nor looks at it later.

    Half a million objects would be walked again and again while they come in, and once more when the program ends.
    Nothing of it happens once they are there, so that a caller's own garbage is never kept.
    """
    if VERBS in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
