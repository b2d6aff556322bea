"""What every section of a spec is made of: a strict pydantic model, and how its values are described to people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Conflict(ValueError):
    """Values that exclude each other. `keys` are theirs, seen from the section; the first is to change."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


@dataclass(frozen=True)
class Words:
    """What a pattern lets through, for error messages."""

    text: str


PositiveInt = Annotated[int, Field(ge=1, strict=True)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A strict, immutable mapping of the spec: no key is ignored, and no value is turned into another type."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
