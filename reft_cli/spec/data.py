"""The section `data` of a spec: where rows come from, and how they become prompts and answers."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from reft_cli.kinds import Overflow
from reft_cli.spec.base import Conflict, PositiveInt, Section

Column = Annotated[str, Field(min_length=1)]
Share = Literal["glue"] | PositiveInt | Annotated[float, Field(gt=0, lt=1)]
SPLITS = ("train", "validation", "test")


class TemplateSpec(Section):
    """A prompt template; {names} in braces are columns, {{ and }} are braces."""

    prompt: str = Field(min_length=1)
    """Text up to where the model takes over."""
    completion: str | None = None
    """Text that is learned; `{completion}` of the format if not given."""
    reference: str | None = None
    """Text that an answer is scored against; what `task.extraction` finds in the completion if not given."""
    replace: dict[Column, str] = Field(default={})
    """Texts that are written differently in the completion, as {in the file: in the answer}."""

    @field_validator("prompt", "completion", "reference")
    @classmethod
    def _braces(cls, text: str | None) -> str | None:
        try:
            names = [name for _, name, _, _ in Formatter().parse(text or "") if name is not None]
        except ValueError:
            raise ValueError("a brace has no partner; write {{ or }} for a brace that is meant as text") from None
        if not all(names):
            raise ValueError("`{}` names no column; write {{}} for braces that are meant as text")
        return text


class SourceSpec(Section):
    """Rows from a file, a folder, an address or the hub."""

    path: str | None = None
    """File (.jsonl, .json, .csv, .parquet), folder, https address of such a file, `bundled:NAME/SPLIT` or hub id; left
    out: that of `data.train`, of which this has to be another split or slice."""
    local: str | None = Field(default=None, min_length=1)
    """Name of the data set's folder or file in `data.folder`, if that is given; it then takes the place of `path`."""
    split: str | None = None
    """Split of a folder or hub data set; slices such as train[:1000] work."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    share: Share | None = None
    """Use only rows drawn under train.seed: so many, or a fraction; glue: 1,000 of more than 5,000, else half."""
    rest: bool = False
    """Use the rows that `share` does not draw, in place of those that it draws."""
    limit: PositiveInt | None = None
    """Use only the first N rows."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often a row stands in an epoch; 2: twice, 0.5: every other one, drawn under train.seed."""
    name: str | None = Field(default=None, min_length=1)
    """What scores call this source where there are several; the last part of its path if not given."""
    template: TemplateSpec | None = None
    """Template of this source alone; takes the place of `data.template`."""

    @model_validator(mode="after")
    def _share_of_something(self) -> SourceSpec:
        if self.rest and self.share is None:
            raise Conflict("the rest of what? write `share` too", "rest", "share")
        return self


Sources = Annotated[list[SourceSpec], Field(min_length=1)]
Mixed = Annotated[list[str | SourceSpec], Field(min_length=1)]
Divided = Annotated[float, Field(gt=0, lt=1)]


def _written_out(given: Any) -> Any:  # noqa: ANN401  whatever the file held
    """Paths in a list of sources as sources."""
    return [{"path": item} if isinstance(item, str) else item for item in given] if isinstance(given, list) else given


class DataSpec(Section):
    """Where rows come from and how they become tokens."""

    folder: str | None = Field(default=None, min_length=1)
    """Folder with copies of data sets, for sources with a `local` name."""
    train: str | SourceSpec | Sources | None = None
    """Training rows: a path, hub id or `bundled:NAME/SPLIT`, a mapping, or a list of these, which are mixed."""
    validation: Divided | str | SourceSpec | Sources | None = None
    """Rows for choosing the best checkpoint; like `train`, or a fraction of the training rows."""
    test: str | SourceSpec | Sources | None = None
    """Rows for `reft eval`; of a list, each source has a score of its own and the mean counts."""
    format: Literal["auto", "completion", "alpaca", "messages", "text", "pair", "preference", "preference_messages"] = (
        "auto"
    )
    """Columns that a row has. completion: prompt, completion. alpaca: instruction, input, output. messages: messages.
    text: text, label. pair: text, text_pair, label. preference: prompt, chosen, rejected. preference_messages: chosen
    and rejected as conversations."""
    columns: dict[str, Column] = Field(default={})
    """Column names, as {name of the format: name in the file}."""
    template: Literal["alpaca", "plain", "chat"] | TemplateSpec | None = None
    """alpaca, plain, chat (the tokenizer's own), or {prompt: …, completion: …}."""
    few_shot: Annotated[int, Field(ge=0, le=64, strict=True)] = 0
    """So many training rows, drawn under train.seed, stand solved before every prompt; they are not trained on."""
    append_eos: bool = True
    """End the answer with the end-of-sequence token, so that generation stops."""
    max_length: Annotated[int, Field(ge=8, strict=True)] = 512
    """Tokens in a row, prompt and answer together."""
    on_overflow: Overflow = "error"
    """Rows longer than max_length: stop, leave out, cut the middle of the prompt (edited tokens stay), or cut the end
    of the answer, as pyreft does."""

    @field_validator("train", "test", mode="before", json_schema_input_type=str | SourceSpec | Mixed | None)
    @classmethod
    def _sources(cls, given: Any) -> Any:  # noqa: ANN401  pydantic hands over what the file held
        return _written_out(given)

    @field_validator("validation", mode="before", json_schema_input_type=Divided | str | SourceSpec | Mixed | None)
    @classmethod
    def _validation_sources(cls, given: Any) -> Any:  # noqa: ANN401  pydantic hands over what the file held
        return _written_out(given)

    @model_validator(mode="after")
    def _paths(self) -> DataSpec:
        lone = self.train if isinstance(self.train, SourceSpec) else None
        if lone is not None and lone.path is None and lone.local is None:
            raise Conflict("missing; it says where the training rows are", "train.path", "train.local")
        for split in SPLITS:
            given = getattr(self, split)
            for index, source in enumerate(given if isinstance(given, list) else ()):
                if source.path is None and source.local is None:
                    here = f"{split}.{index}"
                    raise Conflict(
                        "missing; each source of a list says where its rows are", f"{here}.path", f"{here}.local"
                    )
        if self.train is None:
            if isinstance(self.validation, float):
                raise Conflict("a fraction of the training rows, and data.train is not given", "validation", "train")
            for key, each in (("validation", self.validation), ("test", self.test)):
                if isinstance(each, SourceSpec) and each.path is None and each.local is None:
                    message = "missing, and there is no data.train to fall back on"
                    raise Conflict(message, f"{key}.path", f"{key}.local", "train")
        return self

    @model_validator(mode="after")
    def _folder(self) -> DataSpec:
        for key, source in self.sources():
            if source.path is None and source.local is not None and self.folder is None:
                raise Conflict(
                    f"`{source.local}` is a name in data.folder, which is not given", f"{key}.local", "folder"
                )
            if source.template is not None and (self.columns or self.format != "auto"):
                other = "columns" if self.columns else "format"
                raise Conflict(f"has no meaning where a source has a template of its own ({key})", other, key)
            if source.weight != 1 and not key.startswith("train"):
                raise Conflict("a weight has a meaning in data.train only; remove it", f"{key}.weight")
        return self

    @property
    def has_own_templates(self) -> bool:
        """Whether a source has a template of its own."""
        return any(source.template is not None for _, source in self.sources())

    def sources(self) -> list[tuple[str, SourceSpec]]:
        """(key, source) of every source that is a mapping."""
        found: list[tuple[str, SourceSpec]] = []
        for split in SPLITS:
            given = getattr(self, split)
            if isinstance(given, SourceSpec):
                found.append((split, given))
            elif isinstance(given, list):
                found += [(f"{split}.{index}", source) for index, source in enumerate(given)]
        return found
