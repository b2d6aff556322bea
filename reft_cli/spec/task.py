"""The section `task` of a spec: the objective, and how answers are scored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from reft_cli.kinds import PAIRED, TaskKind
from reft_cli.spec.base import Conflict, Section
from reft_cli.suites import SUITES

KINDS = get_args(TaskKind)
Metric = Literal[
    "exact_match", "accuracy", "f1", "matthews", "pearson", "spearman", "numeric_match", "loss", "perplexity", "margin"
]
RuleName = Literal["number", "number_strict", "letter", "letter_strict", "arithmetic", "arithmetic_strict"]
DEFAULT_METRIC: dict[str, Metric] = {
    "causal_lm": "exact_match",
    "preference": "accuracy",
    "reward": "accuracy",
    "classification": "accuracy",
    "regression": "pearson",
}
BETA = 0.1  # of preference tasks: the first of the paper's values, and pyreft's
FITTING_METRICS: dict[str, tuple[str, ...]] = {
    "causal_lm": tuple(name for name in get_args(Metric) if name != "margin"),
    "preference": ("accuracy", "margin", "loss"),
    "reward": ("accuracy", "margin", "loss"),
    "classification": ("accuracy", "f1", "matthews", "exact_match", "loss"),
    "regression": ("pearson", "spearman", "loss"),
}


KINDS_ELSEWHERE: dict[str, TaskKind] = {  # what other programs call them
    "sft": "causal_lm",
    "dpo": "preference",
    "rm": "reward",
    "seq_cls": "classification",
}


class ExtractionSpec(Section):
    """How the answer is found in generated text. Nothing found: the answer is wrong."""

    after: str | None = Field(default=None, min_length=1)
    """The answer is what stands behind the first occurrence of this text."""
    remove: list[str] = Field(default=[])
    """Texts that are taken out first, such as commas in numbers."""
    pattern: str | None = Field(default=None, min_length=1)
    """Regular expression of the answer: its first group if it has one, else the whole match."""
    take: Literal["first", "last"] = "first"
    """Which match counts."""
    ignore_case: bool = False
    """Whether the pattern matches capitals and small letters alike."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern

    @field_validator("remove")
    @classmethod
    def _no_empty_text(cls, remove: list[str]) -> list[str]:
        if "" in remove:
            raise ValueError("an empty text stands everywhere; remove it")
        return remove

    @model_validator(mode="after")
    def _something(self) -> ExtractionSpec:
        if self.after is None and self.pattern is None:
            raise Conflict("missing; write `after` or `pattern`, which say where the answer is", "pattern")
        if self.pattern is None and (self.take == "last" or self.ignore_case):
            key = "take" if self.take == "last" else "ignore_case"
            raise Conflict("has a meaning with a pattern only", key, "pattern")
        return self


class TaskSpec(Section):
    """The objective and how it is scored."""

    suite: str | None = None
    """A published task, whose data, prompt, scoring and hyperparameters lie below this file; see `reft tasks`."""
    recipe: str | None = None
    """Which of the suite's recipes, where several are published for the method; see `reft tasks show SUITE`."""
    kind: TaskKind = "causal_lm"
    """causal_lm: loss on the answer's tokens; preference: chosen answers before rejected ones (DPO); reward: a head
    that rates answers, from such pairs; classification, regression: a head that is trained along."""
    metric: Metric | None = None
    """Score of `reft eval`; exact_match for causal_lm, pearson for regression, accuracy for the others."""
    beta: Annotated[float, Field(gt=0)] | None = None
    """Of a preference task: how dear it is to leave the base model behind; 0.1 if not given."""
    extraction: RuleName | ExtractionSpec | None = None
    """How the answer is found in generated text; all of it if not given. number: the last one, letter: the first of A
    to E, arithmetic: whichever the reference is, each as published; …_strict: without the mistakes of that rule."""
    labels: list[str] | None = Field(default=None, min_length=2)
    """Names of the classes, in the order of the label numbers; found in the training data if not given."""

    @field_validator("suite")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in SUITES:
            near = KINDS_ELSEWHERE.get(name.lower()) or near_suite(name, [*KINDS, *SUITES])
            meant = f"; did you mean `{near}`?" if near else ""
            raise ValueError(
                f"`{name}` is neither a kind ({', '.join(KINDS)}) nor a suite; `reft tasks` lists them{meant}"
            )
        return name

    @model_validator(mode="after")
    def _metric_fits(self) -> TaskSpec:
        if self.metric is None:
            object.__setattr__(self, "metric", DEFAULT_METRIC[self.kind])
        check_metric(self.metric, self.kind, "metric", "kind")
        if self.kind == "preference" and self.beta is None:
            object.__setattr__(self, "beta", BETA)
        if self.beta is not None and self.kind != "preference":
            raise Conflict(f"beta has no meaning for {self.kind}; remove it", "beta", "kind")
        if self.labels and self.kind in ("regression", *PAIRED):
            raise Conflict(f"labels have no meaning for {self.kind}; remove them", "labels", "kind")
        if self.extraction is not None and self.kind != "causal_lm":
            raise Conflict(f"nothing is generated with task.kind {self.kind}; remove it", "extraction", "kind")
        if self.recipe is not None and self.suite is None:
            raise Conflict("a recipe belongs to a suite; write task.suite too", "recipe", "suite")
        return self

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: list[str] | None) -> list[str] | None:
        for label, count in Counter(labels).items():
            if count > 1:
                raise ValueError(f"the label `{label}` is given twice")
        return labels


def check_metric(metric: str | None, kind: str, *keys: str) -> None:
    """Conflict between `keys` if a metric cannot score this kind of task."""
    fitting = FITTING_METRICS[kind]
    if metric is not None and metric not in fitting:
        shown = ", ".join(name for name in fitting[:-1] if name != "exact_match")
        raise Conflict(f"{metric} does not fit task.kind {kind}; write {shown} or {fitting[-1]}", *keys)


def near_suite(name: str, known: Iterable[str]) -> str | None:
    """The suite, or another word, that was probably meant: `gsm8k` is arithmetic/gsm8k."""
    plain, words = name.lower().replace("_", "-"), list(known)
    ends = [word for word in words if word.rpartition("/")[2].replace("_", "-") == plain]
    return next(iter(ends or get_close_matches(plain, words, 1, 0.5)), None)
