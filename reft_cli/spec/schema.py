"""The sections of a spec, as pydantic models; every field's docstring is its help text and its JSON Schema description.

Nothing here knows files, YAML or tensors. A default stands in this file and nowhere else.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from reft_cli.layers import parse_layers
from reft_cli.positions import Positions

PositiveInt = Annotated[int, Field(ge=1, strict=True)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Column = Annotated[str, Field(min_length=1)]
Method = Literal["loreft", "noreft", "direft", "direft_orthogonal", "consreft", "lobireft", "red"]
Metric = Literal[
    "exact_match", "accuracy", "f1", "matthews", "pearson", "spearman", "numeric_match", "loss", "perplexity"
]
NEEDS_NUMBERS = {"pearson", "spearman", "numeric_match"}


class Section(BaseModel):
    """A strict, immutable mapping of the spec."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSpec(Section):
    """The frozen base model."""

    name: str = Field(min_length=1)
    """Hub id, local folder, or `bundled:NAME`."""
    revision: str | None = None
    """Branch, tag or commit on the hub; the commit is recorded in the run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base's weights and activations; auto: bfloat16 on a GPU that has it, float32 on a CPU.
    Interventions are always float32."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """auto, cpu, mps, cuda or cuda:N."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Attention implementation of transformers."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository brings. Only for repositories you have read."""


class InterventionSpec(Section):
    """What is learned, and where."""

    method: Method = "loreft"
    """How the edit of a hidden state is computed; the README has the formulas."""
    layers: Literal["all"] | list[int] | str = "all"
    """all, a list such as [4, 6, 10], or text such as 4;6;10, 0-15 or 0-15/2."""
    component: str = "block_output"
    """block_input, block_output, attention_output, mlp_output, mlp_activation, or the path of a module inside a block
    with .input or .output, such as mlp.down_proj.input. RED: mlp_output."""
    positions: str = "f7+l7"
    """Edited tokens: f7 (first 7 of the prompt), l7 (last 7), f7+l7, prompt, generated or all. RED: all."""
    rank: PositiveInt | None = None
    """Dimensions of the edited subspace; 4 if not given. Has no meaning for RED."""
    tied: bool = True
    """One set of weights for first and last positions; false: one for each."""
    init: Literal["paper", "identity"] = "paper"
    """paper: random as published; identity: training starts at the base model."""
    dropout: Fraction = 0.0
    """Dropout rate while training."""
    dropout_on: Literal["delta", "output"] = "delta"
    """delta: on the edit; output: on the whole edited hidden state, as pyreft does."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, given: Any) -> Any:  # noqa: ANN401  pydantic hands over what the file held
        if not isinstance(given, dict):
            return given
        if given.get("method") == "red":
            return {"component": "mlp_output", "positions": "all"} | given
        return {"rank": 4} | given

    @field_validator("positions")
    @classmethod
    def _positions(cls, text: str) -> str:
        return str(Positions.parse(text))

    @field_validator("layers")
    @classmethod
    def _layers(cls, layers: str | list[int]) -> str | list[int]:
        parse_layers(layers)
        return layers

    @model_validator(mode="after")
    def _method_fits(self) -> InterventionSpec:
        if self.method == "red" and self.rank is not None:
            raise ValueError(
                "rank has no meaning for RED (it scales and shifts the whole hidden vector); "
                "remove it or use method: loreft"
            )
        if self.method == "consreft" and self.init == "identity":
            raise ValueError(
                "init: identity does not exist for consreft (it sets the subspace to a constant); use init: paper"
            )
        return self


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
        default = {"causal_lm": "exact_match", "classification": "accuracy", "regression": "pearson"}
        if self.metric is None:
            object.__setattr__(self, "metric", default[self.kind])
        numeric = self.metric in {"pearson", "spearman"}
        if (
            self.kind == "classification"
            and (self.metric in NEEDS_NUMBERS or self.metric == "perplexity")
            or (self.kind == "regression" and not (numeric or self.metric == "loss"))
        ):
            fits = {
                "classification": "accuracy, f1, matthews or loss",
                "regression": "pearson, spearman or loss",
            }[self.kind]
            raise ValueError(f"metric {self.metric} does not fit kind {self.kind}; write {fits}")
        if self.labels and self.kind == "regression":
            raise ValueError("labels have no meaning for regression; remove them")
        return self


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
    columns: dict[str, Column] = {}
    """Column names, as {name of the format: name in the file}."""
    template: str | TemplateSpec | None = None
    """alpaca, plain, chat (the tokenizer's own), or {prompt: …, completion: …}."""
    append_eos: bool = True
    """End the answer with the end-of-sequence token, so that generation stops."""
    max_length: Annotated[int, Field(ge=8, strict=True)] = 512
    """Tokens in a row, prompt and answer together."""
    on_overflow: Literal["error", "drop", "truncate_prompt"] = "error"
    """Rows longer than max_length: stop, leave out, or cut the middle of the prompt (edited tokens stay)."""


class TrainSpec(Section):
    """How the intervention is trained."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the training rows."""
    max_steps: PositiveInt | None = None
    """Stop after so many optimizer steps; the schedule ends there too."""
    learning_rate: Annotated[float, Field(gt=0)] = 9e-4
    """Peak of the schedule."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay to zero after the warm-up, or none."""
    warmup_ratio: Fraction = 0.0
    """Share of the steps over which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decay; never applied to orthonormal rows and biases."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this norm; null: never."""
    global_batch_size: PositiveInt = 32
    """Rows in an optimizer step. The only batch number that changes results."""
    micro_batch_size: Literal["auto"] | PositiveInt = "auto"
    """Rows in one pass through the model; auto: by a token budget for the device."""
    layout: Literal["auto", "padded", "packed"] = "auto"
    """padded: one row a sequence; packed: sequences end to end in one row."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    seed: Annotated[int, Field(ge=0, strict=True)] = 42
    """Initial weights, order of the rows, dropout."""
    deterministic: bool = False
    """Only algorithms that give the same bits again; slower on GPUs."""
    log_every: PositiveInt = 10
    """Steps between two lines of metrics."""
    diverge_factor: Annotated[float, Field(gt=1)] = 10.0
    """Stop when the loss is this many times the mean of the last hundred steps."""


class EvaluationSpec(Section):
    """Validation while training."""

    every: Literal["epoch", "never"] | PositiveInt = "epoch"
    """epoch, never, or a number of steps."""
    limit: PositiveInt | None = None
    """Use only the first N validation rows."""


class GenerationSpec(Section):
    """How answers are decoded; flags of `reft infer` and `reft eval` take precedence."""

    max_new_tokens: PositiveInt = 64
    """Longest answer."""
    min_new_tokens: Annotated[int, Field(ge=0, strict=True)] = 0
    """Shortest answer."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: the most probable token, always the same answer; above: sampling."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with this probability."""
    top_k: Annotated[int, Field(ge=0, strict=True)] = 0
    """Sample from the k most probable tokens; 0: from all."""
    beams: PositiveInt = 1
    """Beam search with so many beams."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1: tokens that stand already become less probable."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0, strict=True)] = 0
    """No sequence of so many tokens twice; 0: off."""
    stop: list[str] = []
    """Texts that end an answer; they are cut off."""
    batch_size: PositiveInt = 32
    """Prompts decoded together."""


class CheckpointSpec(Section):
    """What is kept of a run."""

    every: Literal["epoch"] | PositiveInt = "epoch"
    """epoch, or a number of steps."""
    keep: PositiveInt = 2
    """Newest checkpoints that stay; the best one stays too."""
    best: Metric | None = None
    """Validation score that chooses the best checkpoint; that of `task.metric` if there are validation rows."""
    patience: PositiveInt | None = None
    """Stop after so many validations without a better score."""


class Spec(Section):
    """One file for every command."""

    version: Literal[1] = 1
    """Version of this schema."""
    extends: list[str] = []
    """Specs that are read first; this file's keys win. Paths count from this file."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; the file's name if not given."""
    model: ModelSpec
    """The frozen base model: a hub id, a folder, `bundled:NAME`, or a mapping."""
    intervention: InterventionSpec = InterventionSpec()
    """What is learned, and where."""
    task: TaskSpec = TaskSpec()
    """The objective and how it is scored."""
    data: DataSpec = DataSpec()
    """Where rows come from and how they become tokens."""
    train: TrainSpec = TrainSpec()
    """How the intervention is trained."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """Validation while training."""
    generation: GenerationSpec = GenerationSpec()
    """How answers are decoded."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """What is kept of a run."""
    log: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Trackers that get the metrics besides metrics.jsonl."""
    output: str = "runs/{name}"
    """The run folder."""

    @field_validator("model", mode="before")
    @classmethod
    def _model_by_name(cls, given: Any) -> Any:  # noqa: ANN401  pydantic hands over what the file held
        return {"name": given} if isinstance(given, str) else given
