"""The sections of a spec, as pydantic models; every field's docstring is its help text and its JSON Schema description.

The sections `task` and `data` have files of their own. Nothing here knows files, YAML or tensors. A default stands in
its section and nowhere else.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from reft_cli.kinds import ANSWERED, PAIRED, WRITING
from reft_cli.layers import COMPONENTS, parse_layers
from reft_cli.positions import Positions
from reft_cli.spec.base import Conflict, Fraction, PositiveInt, Section, Words
from reft_cli.spec.data import DataSpec, TemplateSpec
from reft_cli.spec.task import KINDS, Metric, TaskSpec, check_metric

COLDEST = 1e-4  # temperatures below it divide logits into infinity
Layers = Annotated[Literal["all"] | list[int] | str, Words("all, a list such as [4, 6], or text such as 0-15/2")]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$"), Words("auto, cpu, mps, cuda or cuda:N")]
Size = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?[KMG]i?B$"), Words("a size such as 20GiB")]
RunName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"),
    Words("a name of letters, digits and . _ - that starts with a letter or digit"),
]
Method = Literal["loreft", "noreft", "direft", "direft_orthogonal", "consreft", "lobireft", "red"]


class ModelSpec(Section):
    """The frozen base model."""

    name: str = Field(min_length=1)
    """Hub id, local folder, or `bundled:NAME`."""
    revision: str | None = None
    """Branch, tag or commit on the hub; the commit is recorded in the run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base's weights and activations; auto: bfloat16 on a GPU that has it, float32 on a CPU.
    Interventions are always float32."""
    device: Device = "auto"
    """auto, cpu, mps, cuda or cuda:N."""
    quantization: Literal["float8", "nf4", "int8"] | None = None
    """float8: the blocks' linear layers in one byte a weight, multiplied at twice the rate of bfloat16 on GPUs from Ada
    and Hopper on; costs some accuracy. nf4, int8: 4 or 8 bits a weight through bitsandbytes; saves memory, not time."""
    device_map: Literal["auto"] | None = None
    """auto: one process lays the base out over all GPUs, then the machine's memory, then its disk, for a base larger
    than one GPU. Slower than on one; several processes spread a base faster, see parallel.shard."""
    max_memory: dict[str, Size] | None = None
    """With device_map, the most that weights take of each device, such as {"0": 60GiB, cpu: 100GiB}; the disk takes the
    rest, and devices that are not named take none."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Attention implementation of transformers."""
    dropout: bool = False
    """Keep the base's own dropout while training, as pyreft's GLUE runs do."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository brings. Only for repositories you have read."""

    @field_validator("max_memory")
    @classmethod
    def _known_places(cls, given: dict[str, str] | None) -> dict[str, str] | None:
        wrong = [name for name in given or {} if not re.fullmatch(r"[0-9]{1,3}|cpu", name)]
        if wrong:
            raise ValueError(f"`{wrong[0]}` is neither cpu nor the number of a GPU")
        return given

    @model_validator(mode="after")
    def _layout_fits(self) -> ModelSpec:
        if self.device_map is None:
            if self.max_memory is not None:
                raise Conflict("has no meaning without device_map; add device_map: auto", "max_memory", "device_map")
            return self
        if self.quantization is not None:
            raise Conflict(
                f"a base in {self.quantization} is not laid out over devices; leave out one of them",
                "device_map",
                "quantization",
            )
        if self.device not in ("auto", "cuda", "cpu"):
            raise Conflict(f"{self.device} is one device; write auto or cuda", "device", "device_map")
        return self


class InterventionSpec(Section):
    """What is learned, and where."""

    method: Method = "loreft"
    """How the edit of a hidden state is computed; the README has the formulas."""
    layers: Layers = "all"
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
        return given if given.get("rank") is not None else given | {"rank": 4}

    @field_validator("positions")
    @classmethod
    def _positions(cls, text: str) -> str:
        return str(Positions.parse(text))

    @field_validator("layers", mode="before", json_schema_input_type=Literal["all"] | list[int] | int | str)
    @classmethod
    def _one_layer(cls, given: Any) -> Any:  # noqa: ANN401  pydantic hands over what the file held
        return [given] if type(given) is int else given

    @field_validator("layers")
    @classmethod
    def _layers(cls, layers: str | list[int]) -> str | list[int]:
        numbers = re.findall(r"\d+", layers) if isinstance(layers, str) else list(map(str, layers))
        longest = max(numbers, key=len, default="")
        if len(longest) > 4:
            raise ValueError(f"no model has a layer {longest[:12]}{'…' if len(longest) > 12 else ''}")
        parse_layers(layers)
        return layers

    @field_validator("component")
    @classmethod
    def _component(cls, name: str) -> str:
        if name not in COMPONENTS and not re.fullmatch(r"[\w.]+\.(input|output)", name):
            near = get_close_matches(name, COMPONENTS, 1, 0.6)
            raise ValueError(
                f"`{name}` is not {', '.join(COMPONENTS)}, or the path of a module with .input or .output"
                + (f"; did you mean `{near[0]}`?" if near else "")
            )
        return name

    @model_validator(mode="after")
    def _method_fits(self) -> InterventionSpec:
        if self.method == "red" and self.rank is not None:
            raise Conflict(
                "rank has no meaning for RED (it scales and shifts the whole hidden vector); "
                "remove it or use method: loreft",
                "rank",
                "method",
            )
        if self.method == "consreft" and self.init == "identity":
            raise Conflict(
                "init: identity does not exist for consreft (it sets the subspace to a constant); use init: paper",
                "init",
                "method",
            )
        return self


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
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the model's blocks; auto: on a GPU, where the run is long enough to win back the time."""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """auto: passes of a small model are recorded once and replayed, where that gives the same result."""
    cache_frozen: Literal["auto", "on", "off"] = "auto"
    """Keep what comes out of the blocks below the lowest edited one, so that later epochs skip them; auto: on a GPU
    whose memory has room for it."""
    share_head: Literal["auto", "off"] = "auto"
    """auto: the head that the rows of a pass have in common, of their template, is computed once, where packed
    sequences give the same result with it."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 42
    """Initial weights, order of the rows, dropout."""
    deterministic: bool = False
    """Only algorithms that give the same bits again; slower on GPUs."""
    log_every: PositiveInt = 10
    """Steps between two lines of metrics."""
    diverge_factor: Annotated[float, Field(gt=1)] = 4.0
    """Stop when 15 of 20 steps in a row have a loss this many times the median of the 80 before, and above that of the
    first five."""

    @model_validator(mode="after")
    def _batches(self) -> TrainSpec:
        if isinstance(self.micro_batch_size, int) and self.micro_batch_size > self.global_batch_size:
            raise Conflict(
                f"{self.micro_batch_size} rows at a time are more than global_batch_size {self.global_batch_size}",
                "micro_batch_size",
                "global_batch_size",
            )
        return self


class EvaluationSpec(Section):
    """Validation while training."""

    every: Literal["epoch", "never"] | PositiveInt = "epoch"
    """epoch, never, or a number of steps."""
    limit: PositiveInt | None = None
    """Use only the first N validation rows of each source."""


class GenerationSpec(Section):
    """How answers are decoded; flags of `reft infer`, `reft eval` and `--set generation.KEY=VALUE` win."""

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
    stop: list[str] = Field(default=[])
    """Texts that end an answer; they are cut off."""
    batch_size: Literal["auto"] | PositiveInt = "auto"
    """Prompts decoded together; it changes the speed, not the answers. auto: 128 on a GPU, else 32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the steps; auto: on a GPU, where enough tokens are to come to win back the time."""

    @field_validator("temperature")
    @classmethod
    def _warm_enough(cls, temperature: float) -> float:
        if 0 < temperature < COLDEST:
            raise ValueError(f"{temperature:g} is too near to 0 to be sampled with; write 0, or at least {COLDEST:g}")
        return temperature

    @field_validator("stop")
    @classmethod
    def _no_empty_text(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError("an empty text would end every answer at once; remove it")
        return stop

    @model_validator(mode="after")
    def _lengths(self) -> GenerationSpec:
        if self.min_new_tokens > self.max_new_tokens:
            raise Conflict(
                f"{self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}",
                "min_new_tokens",
                "max_new_tokens",
            )
        return self

    @property
    def idle(self) -> list[str]:
        """Keys that narrow down what is sampled from, given though nothing is sampled."""
        if self.temperature:
            return []
        return [key for key in ("top_p", "top_k") if getattr(self, key) != type(self).model_fields[key].default]


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


class ParallelSpec(Section):
    """Over how many processes a run is spread; the result is the same for any number."""

    processes: Literal["auto"] | PositiveInt = "auto"
    """Processes on this machine, one a GPU; auto: as many as there are GPUs. On a CPU more than one are slower."""
    shard: bool = False
    """Each process holds a part of every block of the base and gathers a block while it runs (FSDP2), for models that
    do not fit one GPU. Slower than whole ones."""


class Spec(Section):
    """One file for every command."""

    version: Annotated[Literal[1], Words("1, the only version there is")] = 1
    """Version of this schema."""
    extends: list[str] = Field(default=[])
    """Specs that are read first; this file's keys win. Paths count from this file."""
    name: RunName | None = None
    """Name of the run; the file's name if not given."""
    model: Annotated[ModelSpec, Words("text or a mapping with a `name`")]
    """The frozen base model: a hub id, a folder, `bundled:NAME`, or a mapping."""
    intervention: InterventionSpec = InterventionSpec()
    """What is learned, and where."""
    task: Annotated[TaskSpec, Words("text or a mapping with a `kind` or `suite`")] = TaskSpec()
    """The objective and how it is scored: a kind, a suite such as commonsense or glue/sst2, or a mapping."""
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
    parallel: ParallelSpec = ParallelSpec()
    """Over how many processes the run is spread."""
    log: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default=[])
    """Trackers that get the metrics besides metrics.jsonl."""
    output: str = Field(default="runs/{name}", min_length=1)
    """The run folder; {name} is the name of the run."""

    @field_validator("version", mode="before")
    @classmethod
    def _whole_version(cls, given: Any) -> Any:  # noqa: ANN401  pydantic takes true and 1.0 for 1
        return given if type(given) is int else str(given)

    @field_validator("model", mode="before", json_schema_input_type=str | ModelSpec)
    @classmethod
    def _model_by_name(cls, given: Any) -> Any:  # noqa: ANN401  pydantic hands over what the file held
        return {"name": given} if isinstance(given, str) else given

    @field_validator("task", mode="before", json_schema_input_type=str | TaskSpec)
    @classmethod
    def _task_by_name(cls, given: Any) -> Any:  # noqa: ANN401  pydantic hands over what the file held
        return ({"kind": given} if given in KINDS else {"suite": given}) if isinstance(given, str) else given

    @field_validator("output")
    @classmethod
    def _only_the_name(cls, text: str) -> str:
        if re.search(r"[{}]", text.replace("{name}", "")):
            raise ValueError("braces can hold nothing but {name}")
        return text

    @model_validator(mode="after")
    def _sections_fit(self) -> Spec:
        self._validation_fits()
        self._answers_fit()
        self._placement_fits()
        if self.intervention.positions == "generated" and self.task.kind not in ANSWERED:
            raise Conflict(
                f"nothing is generated with task.kind {self.task.kind}; write f7+l7, prompt or all",
                "intervention.positions",
                "task.kind",
            )
        return self

    def _validation_fits(self) -> None:
        best, patience = self.checkpoint.best, self.checkpoint.patience
        check_metric(best, self.task.kind, "checkpoint.best", "task.kind")
        for key, value in (("checkpoint.best", best), ("checkpoint.patience", patience)):
            if value is not None and self.data.validation is None:
                raise Conflict("there are no validation rows to go by; give data.validation", key, "data.validation")
            if value is not None and self.evaluation.every == "never":
                raise Conflict("there is no validation while evaluation.every is never", key, "evaluation.every")

    def _answers_fit(self) -> None:
        template = self.data.template
        given = isinstance(template, TemplateSpec) and template.reference is not None
        if str(self.task.extraction).startswith("arithmetic") and not (given or self.data.has_own_templates):
            raise Conflict(
                f"{self.task.extraction} goes by the reference, and there is none; write data.template.reference, or "
                "task.extraction: number",
                "task.extraction",
                "data.template",
            )
        for key in self.generation.idle:
            raise Conflict(
                "nothing is sampled at temperature 0; write a generation.temperature above 0, or remove it",
                f"generation.{key}",
                "generation.temperature",
            )
        for key in self._of_answers():
            raise Conflict(f"has no meaning with task.kind {self.task.kind}; remove it", key, "task.kind")

    def _placement_fits(self) -> None:
        if self.model.device_map is not None:
            self._one_process_fits()
        if self.parallel.shard and self.model.quantization is not None:
            raise Conflict(
                f"a base in {self.model.quantization} cannot be sharded; leave out one of them",
                "parallel.shard",
                "model.quantization",
            )

    def _one_process_fits(self) -> None:
        if self.parallel.shard:
            raise Conflict(
                "one process lays a base out over devices, and parallel.shard spreads it over processes; leave out one",
                "model.device_map",
                "parallel.shard",
            )
        if self.parallel.processes not in ("auto", 1):
            raise Conflict(
                f"one process takes all devices, and {self.parallel.processes} are asked for; leave out one of them",
                "model.device_map",
                "parallel.processes",
            )
        if self.task.kind not in WRITING:
            raise Conflict(
                f"the head of task.kind {self.task.kind} trains on one device; leave device_map out",
                "model.device_map",
                "task.kind",
            )

    @model_validator(mode="after")
    def _pairs_fit(self) -> Spec:
        kind, given, pairs = self.task.kind, self.data.format, self.task.kind in PAIRED
        if given != "auto" and given.startswith("preference") != pairs:
            wanted = "auto, preference or preference_messages" if pairs else "task.kind preference or another format"
            raise Conflict(f"{given} does not fit task.kind {kind}; write {wanted}", "data.format", "task.kind")
        if kind == "preference" and self.model.dropout:
            raise Conflict(
                "the reference would be another model in each step; remove it or write another task.kind",
                "model.dropout",
                "task.kind",
            )
        return self

    def _of_answers(self) -> list[str]:
        """Keys that are given and have a meaning for written answers only, templates of sources for single ones."""
        if self.task.kind == "causal_lm":
            return []
        answers = self.task.kind in PAIRED
        keys = ["data.few_shot"] if self.data.few_shot and not answers else []
        keys += ["data.on_overflow"] if self.data.on_overflow == "truncate_answer" and not answers else []
        return keys + [f"data.{key}.template" for key, source in self.data.sources() if source.template is not None]
