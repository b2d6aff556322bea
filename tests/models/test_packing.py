"""Families whose masks know packed sequences are told from those whose masks do not."""

from __future__ import annotations

import pytest

from reft_cli.models.packing import keeps_packed_apart
from tiny_models import DECODERS, base_of


@pytest.mark.parametrize("family", DECODERS)
def test_packing_is_known_by_trying(family: str):
    assert keeps_packed_apart(base_of(family).model) == (family != "opt")  # OPT builds a mask of its own
