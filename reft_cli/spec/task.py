"""The section `task` of a spec: the objective, and how answers are scored."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pydantic import Field, field_validator, model_validator

from reft_cli.spec.base import Conflict, Section

Metric = Literal[
    "exact_match", "accuracy", "f1", "matthews", "pearson", "spearman", "numeric_match", "loss", "perplexity"
]
DEFAULT_METRIC: dict[str, Metric] = {
    "causal_lm": "exact_match",
    "classification": "accuracy",
    "regression": "pearson",
}
FITTING_METRICS: dict[str, tuple[str, ...]] = {  # causal_lm: all
    "classification": ("accuracy", "f1", "matthews", "exact_match", "loss"),
    "regression": ("pearson", "spearman", "loss"),
}


class TaskSpec(Section):
    """The objective and how it is scored."""

    kind: Literal["causal_lm", "classification", "regression"] = "causal_lm"
    """causal_lm: loss on the answer's tokens; classification, regression: a head that is trained along."""
    metric: Metric | None = None
    """Score of `reft eval`; exact_match for causal_lm, accuracy for classification, pearson for regression."""
    labels: list[str] | None = Field(default=None, min_length=2)
    """Names of the classes, in the order of the label numbers; found in the training data if not given."""

    @model_validator(mode="after")
    def _metric_fits(self) -> TaskSpec:
        if self.metric is None:
            object.__setattr__(self, "metric", DEFAULT_METRIC[self.kind])
        check_metric(self.metric, self.kind, "metric", "kind")
        if self.labels and self.kind == "regression":
            raise Conflict("labels have no meaning for regression; remove them", "labels", "kind")
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
    fitting = FITTING_METRICS.get(kind)
    if metric is not None and fitting is not None and metric not in fitting:
        shown = ", ".join(name for name in fitting[:-1] if name != "exact_match")
        raise Conflict(f"{metric} does not fit task.kind {kind}; write {shown} or {fitting[-1]}", *keys)
