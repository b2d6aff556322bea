"""The section `data` of a spec: where rows come from, and how they become prompts and answers."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from reft_cli.spec.base import Conflict, PositiveInt, Section

Column = Annotated[str, Field(min_length=1)]


class SourceSpec(Section):
    """Rows from a file, a folder or the hub."""

    path: str | None = None
    """File (.jsonl, .json, .csv, .parquet), folder, `bundled:NAME/SPLIT` or hub id; left out: that of `data.train`."""
    split: str | None = None
    """Split of a folder or hub data set; slices such as train[:1000] work."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    limit: PositiveInt | None = None
    """Use only the first N rows."""


class TemplateSpec(Section):
    """A prompt template; {names} in braces are columns, {{ and }} are braces."""

    prompt: str = Field(min_length=1)
    """Text up to where the model takes over."""
    completion: str | None = None
    """Text that is learned; `{completion}` of the format if not given."""

    @field_validator("prompt", "completion")
    @classmethod
    def _braces(cls, text: str | None) -> str | None:
        try:
            names = [name for _, name, _, _ in Formatter().parse(text or "") if name is not None]
        except ValueError:
            raise ValueError("a brace has no partner; write {{ or }} for a brace that is meant as text") from None
        if not all(names):
            raise ValueError("`{}` names no column; write {{}} for braces that are meant as text")
        return text


class DataSpec(Section):
    """Where rows come from and how they become tokens."""

    train: str | SourceSpec | None = None
    """Training rows; a path, hub id or `bundled:NAME/SPLIT`, or a mapping."""
    validation: Annotated[float, Field(gt=0, lt=1)] | str | SourceSpec | None = None
    """Rows for choosing the best checkpoint; like `train`, or a fraction of the training rows."""
    test: str | SourceSpec | None = None
    """Rows for `reft eval`."""
    format: Literal["auto", "completion", "alpaca", "messages", "text", "pair"] = "auto"
    """Columns that a row has. completion: prompt, completion. alpaca: instruction, input, output. messages: messages.
    text: text, label. pair: text, text_pair, label."""
    columns: dict[str, Column] = Field(default={})
    """Column names, as {name of the format: name in the file}."""
    template: Literal["alpaca", "plain", "chat"] | TemplateSpec | None = None
    """alpaca, plain, chat (the tokenizer's own), or {prompt: …, completion: …}."""
    append_eos: bool = True
    """End the answer with the end-of-sequence token, so that generation stops."""
    max_length: Annotated[int, Field(ge=8, strict=True)] = 512
    """Tokens in a row, prompt and answer together."""
    on_overflow: Literal["error", "drop", "truncate_prompt"] = "error"
    """Rows longer than max_length: stop, leave out, or cut the middle of the prompt (edited tokens stay)."""

    @model_validator(mode="after")
    def _paths(self) -> DataSpec:
        if isinstance(self.train, SourceSpec) and self.train.path is None:
            raise Conflict("missing; it says where the training rows are", "train.path")
        if self.train is None:
            if isinstance(self.validation, float):
                raise Conflict("a fraction of the training rows, and data.train is not given", "validation", "train")
            for key, source in (("validation", self.validation), ("test", self.test)):
                if isinstance(source, SourceSpec) and source.path is None:
                    raise Conflict("missing, and there is no data.train to fall back on", f"{key}.path", "train")
        return self
