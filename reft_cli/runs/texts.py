"""From a spec, or from a checkpoint's manifest, to examples: format, template and classes, chosen once.

A `TextSide` is what training chose and what inference has to repeat; it is stored with the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from reft_cli.checkpoint import Manifest, TextIdentity
from reft_cli.data.cache import Tell, cached, silent
from reft_cli.data.encode import Encoded, encode_examples, encode_prompts, fingerprint
from reft_cli.data.examples import Example
from reft_cli.data.formats import Format, choose_format, format_from_dict
from reft_cli.data.mixing import set_apart
from reft_cli.data.records import Rows
from reft_cli.data.templates import Inline, Template, TextTemplate, choose_template, template_from_dict
from reft_cli.errors import CheckpointError, Problem, SpecError
from reft_cli.kinds import PAIRED, WRITING, Overflow, TaskKind
from reft_cli.positions import Positions
from reft_cli.runs.sources import template_of, training_rows
from reft_cli.spec.quoting import printable
from reft_cli.spec.schema import Spec
from reft_cli.spec.task import ExtractionSpec, RuleName


@dataclass(frozen=True)
class TextSide:
    """How rows become tokens for one run."""

    tokenizer: PreTrainedTokenizerBase
    data_format: Format
    template: Template
    kind: TaskKind
    positions: Positions
    append_eos: bool
    max_length: int
    on_overflow: Overflow
    labels: tuple[str, ...] | None
    labels_given: bool
    extraction: RuleName | ExtractionSpec | None = None
    beta: float | None = None

    @property
    def writes(self) -> bool:
        """Whether the model answers with text."""
        return self.kind in WRITING

    def encode(self, rows: Rows, *, tell: Tell = silent) -> Encoded:
        """Rows with answers or labels as examples, kept ones if there are any; `tell` hears what the cache did."""
        settings: dict[str, Any] = {  # all that rows are encoded by has to be in their key
            "task_kind": self.kind,
            "positions": self.positions,
            "max_length": self.max_length,
            "on_overflow": self.on_overflow,
            "append_eos": self.append_eos,
            "classes": self.labels,
            "classes_given": self.labels_given,
        }
        made_of: dict[str, Any] = {
            "tokenizer": self.tokenizer,
            "template": self.template,
            "data_format": self.data_format,
        }
        key = fingerprint(rows, settings=settings, **made_of)
        return cached(rows.name, key=key, make=lambda: encode_examples(rows, **made_of, **settings), tell=tell)

    def prompts(self, fields: Sequence[Mapping[str, Any]]) -> list[Example]:
        """Rows without answers, as examples; a reward model rates answers, so that its rows have one."""
        return encode_prompts(
            fields,
            tokenizer=self.tokenizer,
            template=self.template,
            task_kind=self.kind,
            append_eos=self.append_eos,
        )

    def identity(self, metric: str) -> TextIdentity:
        """What a checkpoint keeps of it."""
        return TextIdentity(
            kind=self.kind,
            metric=metric,
            format=self.data_format.to_dict(),
            template=self.template.to_dict(),
            labels=list(self.labels) if self.labels else None,
            labels_given=self.labels_given,
            append_eos=self.append_eos,
            max_length=self.max_length,
            on_overflow=self.on_overflow,
            extraction=self.extraction,
            beta=self.beta,
        )


def text_side_of(manifest: Manifest, *, tokenizer: PreTrainedTokenizerBase) -> TextSide:
    """The text side that a checkpoint was trained with. CheckpointError: its format or template cannot be."""
    stored = manifest.text
    try:
        data_format, template = format_from_dict(stored.format), template_from_dict(stored.template)
        assert template.prompt_fields is not None  # parses the placeholders
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        text = printable(f"{type(error).__name__} {error}", limit=200)
        raise CheckpointError(f"the checkpoint's format or template is not one of reft's: {text}") from error
    return TextSide(
        tokenizer=tokenizer,
        data_format=data_format,
        template=template,
        kind=stored.kind,
        positions=Positions.parse(manifest.intervention.positions),
        append_eos=stored.append_eos,
        max_length=stored.max_length,
        on_overflow=stored.on_overflow,
        labels=tuple(stored.labels) if stored.labels else None,
        labels_given=stored.labels_given,
        extraction=stored.extraction,
        beta=stored.beta,
    )


def choose_text_side(spec: Spec, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> TextSide:
    """The text side of a spec, with format and template chosen by the columns of its training rows."""
    data, columns, kind = spec.data, rows.columns, spec.task.kind
    given = template_of(data)
    data_format = choose_format(
        columns,
        where=rows.where(0),
        requested="preference" if kind in PAIRED and data.format == "auto" else data.format,
        mapping=data.columns,
        any_columns=isinstance(given, Inline) and (given.completion is not None or kind != "causal_lm"),
    )
    return TextSide(
        tokenizer=tokenizer,
        data_format=data_format,
        template=choose_template(given, data_format=data_format, task_kind=kind, columns=columns, tokenizer=tokenizer),
        kind=kind,
        positions=Positions.parse(spec.intervention.positions),
        append_eos=data.append_eos,
        max_length=data.max_length,
        on_overflow=data.on_overflow,
        labels=tuple(spec.task.labels) if spec.task.labels else None,
        labels_given=spec.task.labels is not None,
        extraction=spec.task.extraction,
        beta=spec.task.beta,
    )


@dataclass(frozen=True)
class TrainingData:
    """The encoded rows of a run, and what they were made from."""

    text: TextSide
    train: Encoded
    validation: Encoded | None
    fingerprints: dict[str, str]


def load_training_data(spec: Spec, tokenizer: PreTrainedTokenizerBase, *, tell: Tell = silent) -> TrainingData:
    """Read and encode the training and validation rows of a spec; `tell` hears what the cache did."""
    rows, held_out = training_rows(spec)
    text = choose_text_side(spec, rows, tokenizer)
    fingerprints = {"train": rows.fingerprint}
    if spec.data.few_shot:
        shots, rows = set_apart(rows, count=spec.data.few_shot, seed=spec.train.seed)
        text = replace(text, template=_after(shots, text))
    train = text.encode(rows, tell=tell)
    text = replace(text, labels=train.classes)
    validation = None if held_out is None else text.encode(held_out, tell=tell)
    if held_out is not None:
        fingerprints["validation"] = held_out.fingerprint
    return TrainingData(text, train, validation, fingerprints)


def _after(shots: Rows, text: TextSide) -> Template:
    """The template with solved rows before each prompt, a blank line after each. SpecError: it has turns, not text."""
    template = text.template
    if not isinstance(template, TextTemplate):
        raise SpecError(
            Problem(
                "solved rows go before a text; write data.template with a prompt and a completion", key="data.few_shot"
            )
        )
    solved = []
    for index, row in enumerate(shots.rows):
        where = shots.where(index)
        fields = text.data_format.single(text.data_format.fields_of(row, where=where), where=where)
        prompt, answer = template.render_prompt(fields, where=where), template.render_completion(fields, where=where)
        solved.append(f"{prompt}{answer}\n\n")
    return template.after("".join(solved))


def without_answers(examples: Sequence[Example]) -> list[Example]:
    """The prompts of examples, with the very ids that they have there."""
    return [replace(each, input_ids=each.input_ids[: each.prompt_length]) for each in examples]
