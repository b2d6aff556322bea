"""`train`: from a spec to a run folder with checkpoints."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from reft_cli.checkpoint import write_checkpoint
from reft_cli.errors import CheckpointError, DataError, ReftError, SpecError
from reft_cli.evaluation.evaluate import References
from reft_cli.evaluation.metrics import LOWER_IS_BETTER
from reft_cli.models.compiling import compile_seconds
from reft_cli.models.intervened import IntervenedModel
from reft_cli.models.loading import BaseModel, load_tokenizer
from reft_cli.parallel.collective import (
    by_first,
    copy_first,
    from_first,
    gathered,
    is_first,
    joined,
    size,
    together,
)
from reft_cli.parallel.world import is_launched
from reft_cli.runfolder import RunFolder, step_of
from reft_cli.runs.assemble import (
    base_source,
    best_metric,
    build_from_spec,
    check_lengths,
    decoding_of,
    evaluator_of,
    load_base,
    load_trainables,
    manifest_fields,
    slots_of,
    token_budget,
)
from reft_cli.runs.execution import Choice, Execution, choose_execution
from reft_cli.runs.failures import failures_noted
from reft_cli.runs.memory import first_budget, memory_parts_of
from reft_cli.runs.resuming import Start, check_same_run, rewind, starting_point
from reft_cli.runs.signals import StopSignals, stop_signals
from reft_cli.runs.texts import TrainingData, load_training_data, without_answers
from reft_cli.spec.load import LoadedSpec
from reft_cli.spec.resolved import resolved_yaml
from reft_cli.spec.schema import Spec
from reft_cli.tasks.preferences import task_of
from reft_cli.training.loop import Hooks, Trainer, TrainSettings
from reft_cli.training.observer import NullObserver, Observer
from reft_cli.training.state import Progress

TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    run: Path
    step: int
    metrics: dict[str, float]
    """The last loss, and the best validation score under its name."""
    best: Path | None
    reason: str


def train(
    loaded: LoadedSpec,
    *,
    output: Path | None = None,
    name: str | None = None,
    resume: str | None = None,
    overwrite: bool = False,
    observer: Observer,
) -> TrainResult:
    """Train what a spec asks for; `resume` is `last` or a step of a run that was begun before.

    In each process that a launcher started, this trains that process's share; only the first one writes and tells the
    observer. Every ReftError may come, in all processes the same; the run folder then says failed or interrupted, and
    keeps its checkpoints.
    """
    spec = loaded.spec
    path = loaded.run_path(output=output, name=name)
    with joined(device=spec.model.device):
        _check_processes(spec)
        if not is_first():
            observer = NullObserver()
        with together():
            if is_first():
                RunFolder(path).check(resume=resume is not None, overwrite=overwrite)
            work = _prepared(spec, RunFolder(path), observer)
        work.meet()
        start, work.token_budget = from_first(lambda: work.opened(loaded, resume=resume, overwrite=overwrite))
        with failures_noted(work.run, spec, observer), stop_signals() as signals:
            if is_first() and resume is not None:
                rewind(work.run, start)
                work.run.prune(spec.checkpoint.keep)  # what the kill kept from being done, half-written folders too
                if start is None:
                    observer.on_message("warning", "no checkpoint yet: starting over")
            return work.train(start, signals=signals)


def _prepared(spec: Spec, run: RunFolder, observer: Observer) -> _Work:
    """Everything that is loaded and built before the run folder is touched."""
    _check_trackers(spec)
    _set_determinism(spec.train.deterministic)
    tokenizer = load_tokenizer(base_source(spec.model))
    data = load_training_data(spec, tokenizer, tell=partial(observer.on_message, "debug"))
    source = replace(base_source(spec.model), shard=spec.parallel.shard)
    base = load_base(source, data.text, seed=spec.train.seed)
    check_lengths(base, data, spec)
    model = build_from_spec(base, spec)
    execution = choose_execution(model, spec, data.train.examples)
    return _Work(run=run, spec=spec, base=base, model=model, data=data, execution=execution, observer=observer)


class _Work:
    """One run while it is trained: what the loop is given to call."""

    def __init__(
        self,
        *,
        run: RunFolder,
        spec: Spec,
        base: BaseModel,
        model: IntervenedModel,
        data: TrainingData,
        execution: Execution,
        observer: Observer,
    ) -> None:
        self.run, self.spec, self.base, self.model, self.data = run, spec, base, model, data
        self.observer = observer
        self.execution = execution
        self.devices: list[str] = []
        self.references: References = {}  # of validation pairs
        self.token_budget = token_budget(model.device)
        self.accelerator = Accelerator(
            cpu=model.device.type == "cpu", log_with=list(spec.log) or None, project_dir=str(run.path)
        )

    def meet(self) -> None:
        """Learn of the other processes. DataError: they read other rows."""
        device = self.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        found = gathered((name, self.data.fingerprints))
        self.devices = [name for name, _ in found]
        for rank, (_, fingerprints) in enumerate(found):
            for split, fingerprint in fingerprints.items():
                if fingerprint != found[0][1][split]:
                    raise DataError(f"data.{split}: process {rank} reads other rows than process 0")

    def facts(self) -> dict[str, Any]:
        """What run.json keeps of the set-up."""
        return {
            "devices": self.devices,
            "processes": size(),
            "base": {
                "name": self.base.name,
                "commit": self.base.commit,
                "shape_hash": self.base.shape_hash,
                "dtype": str(next(self.model.base_model.parameters()).dtype).removeprefix("torch."),
                "parameters": self.model.base_count(),
            },
            "places": self.model.places,
            "trainable": self.model.trainable_count(),
            "data": {
                split: {"name": encoded.name, "read": encoded.counts.read, "used": encoded.counts.used}
                | {"fingerprint": self.data.fingerprints[split]}
                for split, encoded in (("train", self.data.train), ("validation", self.data.validation))
                if encoded is not None
            },
            **self.execution.to_dict(),
            "micro_batch": self.spec.train.micro_batch_size,
            "token_budget": self.token_budget,
        }

    def opened(self, loaded: LoadedSpec, *, resume: str | None, overwrite: bool) -> tuple[Start | None, int]:
        """Take the run folder, say in it what begins, and find where to go on; for the first process only.

        Besides the start, the tokens of a pass: on the same devices as before, those that were found then.
        """
        RunFolder.create(self.run.path, resume=resume is not None, overwrite=overwrite)
        start = self._starting_point(resume) if resume is not None else None
        known = self.run.read() if resume is not None else {}
        if known.get("devices") == self.devices and isinstance(found := known.get("token_budget"), int) and found > 0:
            self.token_budget = found
        self.run.begin(command=sys.argv, facts=self.facts())  # first, so that a folder is never taken for no run
        self.run.write_spec(loaded.text, resolved=resolved_yaml(loaded))
        return start, self.token_budget

    def _starting_point(self, which: str) -> Start | None:
        """Where to go on, if the run may. Nothing is written; if it may not, the folder is let go of."""
        try:
            check_same_run(self.run, self.spec, self.data.fingerprints, self.observer)
            start = starting_point(self.run, which)
        except ReftError:
            self.run.release()
            raise
        if start is not None and start.refused is not None:
            told = f"{start.refused}; passed over for the newest whole one, of step {start.progress.step}"
            self.observer.on_message("warning", told)
        return start

    def train(self, start: Start | None, *, signals: StopSignals) -> TrainResult:
        """Run the loop from a start to its end and close the folder's books."""
        spec, train = self.spec, self.spec.train
        self._guess_budget()
        self.model.checkpoint_activations(train.gradient_checkpointing)
        torch.manual_seed(train.seed)
        trainer = Trainer(
            self.model,
            task=task_of(spec.task.kind, beta=spec.task.beta),
            examples=self.data.train.examples,
            groups=self.model.groups,
            pad_token_id=self.data.text.tokenizer.pad_token_id or 0,
            settings=self._settings(),
            accelerator=self.accelerator,
            observer=self.observer,
            hooks=Hooks(
                validate=(lambda: self._validate(signals)) if self.data.validation is not None else None,
                save=self._save,
                mark_best=lambda step: by_first(lambda: self.run.link("best", self.run.checkpoint(step))),
                log=self._log,
                signal=signals.agreed,
                last_good=self._last_good,
                unrecorded=self._unrecorded,
            ),
        )
        if start is not None:
            self._go_on(trainer, start)
        copy_first(list(trainer.parameters.values()))  # machines differ in the last bit of what they draw
        if spec.log:
            self.accelerator.init_trackers("reft", config={"run": self.run.path.name})
        with self.model:
            self._fit(trainer)
            reason = trainer.run({"run": str(self.run.path)})
        if spec.log:
            self.accelerator.end_training()
        return self._finish(trainer.progress, reason)

    def _guess_budget(self) -> None:
        """On a GPU, begin the search for the tokens of a pass at what its free memory may hold."""
        device = self.model.device
        if device.type == "cuda" and self.spec.train.micro_batch_size == "auto":
            parts = memory_parts_of(
                self.model,
                task_of(self.spec.task.kind, beta=self.spec.task.beta),
                examples=self.data.train.examples,
                groups=self.model.groups,
                layout=self.execution.layout,
                checkpointing=self.spec.train.gradient_checkpointing,
                compiled=self.execution.compiled.taken,
            )
            self.token_budget = first_budget(
                self.token_budget, parts, self.model.devices, recorded=self.execution.recorded.taken
            )

    def _fit(self, trainer: Trainer) -> None:
        """Settle how many tokens a pass may have, and write it down for a resumed run."""
        before = trainer.settings.token_budget
        self.token_budget = found = trainer.fit()
        if found <= before // 2:
            self.observer.on_message("info", f"{found:,} tokens a pass; {before:,} are too many for this device")
        by_first(lambda: self.run.note({"token_budget": found}))

    def _settings(self) -> TrainSettings:
        train, checkpoint = self.spec.train, self.spec.checkpoint
        best = best_metric(self.spec)
        return TrainSettings(
            epochs=train.epochs,
            max_steps=train.max_steps,
            learning_rate=train.learning_rate,
            schedule=train.schedule,
            warmup_ratio=train.warmup_ratio,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            global_batch_size=train.global_batch_size,
            micro_batch_size=None if train.micro_batch_size == "auto" else train.micro_batch_size,
            token_budget=self.token_budget,
            layout=self.execution.layout,
            compiled=self.execution.compiled.taken,
            forgiving=train.compile == "auto",
            recorded=self.execution.recorded.taken,
            cached=self.execution.cached.taken,
            shared=self.execution.shared.taken,
            seed=train.seed,
            log_every=train.log_every,
            diverge_factor=train.diverge_factor,
            validate_every=self.spec.evaluation.every,
            save_every=checkpoint.every,
            patience=checkpoint.patience,
            lower_is_better=best in LOWER_IS_BETTER,
            best_metric=best,
        )

    def _validate(self, signals: StopSignals) -> dict[str, float]:
        """Scores of the validation rows. Interrupted: a signal came; the parts of a sharded base run on, in step."""
        stop = None if self.model.is_sharded else signals.stop
        assert self.data.validation is not None
        examples = self.data.validation.examples
        generation = self.spec.generation
        evaluator = evaluator_of(
            self.data.text,
            model=self.model,
            metric=best_metric(self.spec),
            decoding=decoding_of(generation),
            batch_size=slots_of(generation),
            tokens=self.token_budget,
            layout=self.execution.layout,
            shared=self.execution.shared.taken,
            references=self.references,
        )
        prompts = without_answers(examples)
        return evaluator.run(self.model, examples, prompts=prompts, on_progress=stop).metrics

    def _save(self, progress: Progress, state: dict[str, Tensor]) -> None:
        path = self.run.checkpoint(progress.step)
        fields = manifest_fields(
            spec=self.spec, base=self.base, model=self.model, text=self.data.text, step=progress.step
        )

        def write() -> None:
            write_checkpoint(
                path, tensors=self.model.trainable_state(), manifest=fields, training=(state, progress.to_json())
            )
            self.run.link("last", path)
            self.run.prune(self.spec.checkpoint.keep)

        by_first(write)
        self.observer.on_checkpoint(progress.step, path)

    def _log(self, values: dict[str, float], step: int) -> None:
        by_first(lambda: self.run.append_metrics({"step": step} | values))
        if self.spec.log:
            self.accelerator.log(values, step=step)

    def _last_good(self, began: int) -> str:
        """The last checkpoint whose weights gave a good loss in the step after it; `began`: the first bad one."""
        good = [path for path in self.run.checkpoints() if step_of(path) < began - 1]
        if not good:
            return "There is no checkpoint from before that."
        return f"Last good checkpoint: {good[-1].relative_to(self.run.path)}."

    def _unrecorded(self, reason: str) -> None:
        self.observer.on_message("warning", f"CUDA graphs are off, {reason}")
        if is_first():
            self.run.note(replace(self.execution, recorded=Choice(False, reason)).to_dict())

    def _go_on(self, trainer: Trainer, start: Start) -> None:
        load_trainables(self.model, start.checkpoint)
        try:
            trainer.resume(start.progress, start.tensors)
        except (TypeError, KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{start.checkpoint.path}: its training state does not fit: {error}") from error
        step, steps = start.progress.step, trainer.steps
        done = f"step {step} is reached already, {steps} were asked for: nothing is left to train"
        said = f"going on from step {step} of {steps}" if step < steps else done
        self.observer.on_message("info", said)

    def _finish(self, progress: Progress, reason: str) -> TrainResult:
        metrics = {"loss": progress.recent_losses[-1]}
        if progress.best_score is not None:
            metrics[f"validation_{best_metric(self.spec)}"] = progress.best_score
        books = {"step": progress.step, "metrics": metrics, "seconds": round(progress.seconds, 2)}

        def write() -> None:
            self.run.note(books | {"compile_seconds": round(compile_seconds(), 2)})
            self.run.finish("done", exit_code=0, reason=reason)
            self.run.write_card()

        by_first(write)
        self.observer.on_end(reason)
        return TrainResult(self.run.path, progress.step, metrics, self.run.linked("best"), reason)


def _check_processes(spec: Spec) -> None:
    wanted = spec.parallel.processes
    if is_launched() and wanted not in ("auto", size()):
        raise SpecError(f"parallel.processes: {wanted}, and the launcher started {size()}; write auto")
    if spec.model.device_map is not None and size() > 1:
        raise SpecError(f"model.device_map: one process takes all devices, and the launcher started {size()}")


def _check_trackers(spec: Spec) -> None:
    for tracker in spec.log:
        if importlib.util.find_spec(TRACKER_PACKAGES[tracker]) is None:
            extra = "pip install 'reft[track]'" if tracker == "tensorboard" else f"pip install {tracker}"
            raise SpecError(f"log: {tracker} is not installed: {extra}")


def _set_determinism(wanted: bool) -> None:
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
