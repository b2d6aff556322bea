"""The training loop: global batches, one optimizer step each, on as many processes as Accelerate was started with.

The loss of a step is the mean over the units (answer tokens or rows) of its global batch, whatever the micro-batches
and processes. Validation and saving are handed in, so this file imports neither.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from signal import Signals
from statistics import median
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from reft_cli.data.batch import Batch, Layout, build_batch
from reft_cli.data.examples import Example, Examples
from reft_cli.data.loader import GlobalBatch, Loader
from reft_cli.errors import Diverged, Interrupted
from reft_cli.models.intervened import IntervenedModel
from reft_cli.parallel.collective import add_up, largest, together
from reft_cli.positions import PositionGroup
from reft_cli.tasks.objectives import Task
from reft_cli.tasks.preferences import Preference
from reft_cli.training import budget
from reft_cli.training.divergence import BEGINNING, LOSS_WINDOW, Fault, fault_of
from reft_cli.training.frozen_cache import CachedPasses
from reft_cli.training.observer import EvaluationRecord, Observer, StepRecord
from reft_cli.training.optimizer import all_gradients, build_optimizer, trainable_parameters
from reft_cli.training.passes import Passes, PlainPasses, RecordedPasses
from reft_cli.training.reference import NAME as REFERENCES
from reft_cli.training.reference import ReferencePasses
from reft_cli.training.schedule import Order, rate_factor
from reft_cli.training.state import Progress, capture_state, restore_state, seed_step


@dataclass(frozen=True)
class TrainSettings:
    """Flat settings of a run; the spec's sections `train`, `evaluation` and `checkpoint` say what each means."""

    epochs: float
    max_steps: int | None
    learning_rate: float
    schedule: str
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float | None
    global_batch_size: int
    micro_batch_size: int | None
    token_budget: int
    layout: Layout
    compiled: bool
    forgiving: bool
    """What cannot be compiled runs as it stands."""
    recorded: bool
    cached: bool
    shared: bool
    """A head that the rows of a pass have in common is computed once."""
    seed: int
    log_every: int
    diverge_factor: float
    validate_every: int | Literal["epoch", "never"]
    save_every: int | Literal["epoch"]
    patience: int | None
    lower_is_better: bool
    best_metric: str


@dataclass
class Hooks:
    """What the loop calls and does not know: validation, saving, and a signal: SIGUSR1 saves, others save and stop.

    Interrupted may come out of `validate`, if a signal came while it was at work.
    Each is called in every process, but for `unrecorded`: where and when passes turn out not to be recordable.
    `last_good` names what was saved before the losses from a step on went wrong.
    """

    validate: Callable[[], dict[str, float]] | None
    save: Callable[[Progress, dict[str, Tensor]], None]
    mark_best: Callable[[int], None]
    log: Callable[[dict[str, float], int], None]
    signal: Callable[[], int | None]
    last_good: Callable[[int], str]
    unrecorded: Callable[[str], None] = lambda _: None


class Trainer:
    """One run of the loop over one model and its examples."""

    def __init__(
        self,
        model: IntervenedModel,
        *,
        task: Task,
        examples: Sequence[Example],
        groups: Sequence[PositionGroup],
        pad_token_id: int,
        settings: TrainSettings,
        accelerator: Accelerator,
        observer: Observer,
        hooks: Hooks,
    ) -> None:
        self.model, self.task, self.settings = model, task, settings
        self.accelerator, self.observer, self.hooks = accelerator, observer, hooks
        self.order = Order(len(examples), settings.global_batch_size, settings.seed)
        self.steps = self.order.steps(settings.epochs, settings.max_steps)
        self.parameters = trainable_parameters(model)
        self.optimizer = build_optimizer(
            model, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay
        )
        half = next(model.base_model.parameters()).dtype == torch.float16
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=half)
        plain = PlainPasses(model, task, self.scaler)
        self.passes: Passes = plain
        if settings.recorded:
            self.passes = RecordedPasses(model, task, pad_token_id=pad_token_id, tell=hooks.unrecorded)
        if settings.cached:
            self.passes = CachedPasses(self.passes, plain, tokens=len(Examples.of(examples).tokens))
        self.references: ReferencePasses | None = None
        if isinstance(task, Preference):
            self.passes = self.references = ReferencePasses(self.passes, model, task, Examples.of(examples))
        self.loader = Loader(
            examples,
            groups=groups,
            layout=settings.layout,
            pad_token_id=pad_token_id,
            token_budget=settings.token_budget,
            micro_batch_size=settings.micro_batch_size,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            device=model.device,
            prepare=self.passes.prepare,
            share_head=settings.shared,
        )
        self.progress = Progress()
        self._pending: list[tuple[int, Tensor, list[int]]] = []  # (step, loss, rows) not yet looked at

    def resume(self, progress: Progress, tensors: dict[str, Tensor]) -> None:
        """Go on from a captured state; the model's weights are loaded already."""
        self.progress = progress
        restore_state(tensors, self.optimizer, self.parameters, self.model.devices)
        if self.references is not None and REFERENCES in tensors:  # not in checkpoints of older versions
            self.references.restore(tensors[REFERENCES])
        if progress.loss_scale:
            self.scaler.load_state_dict(progress.loss_scale)

    def run(self, summary: Mapping[str, object]) -> str:
        """Train to the end; returns why it ended: `finished` or `patience`. The observer is told the summary.

        Diverged: the loss is not finite or exploded. Interrupted: a signal came, and a checkpoint was saved.
        """
        self.observer.on_start(self.steps, self.progress.step, summary)
        self.model.train()
        with self.running():
            return self._loop()

    def fit(self) -> int:
        """Find how many tokens a pass may have on this device, by trying; returns them. The hooks have to be on.

        Rows are tried whole: the next ones may have no head in common.

        OutOfMemoryError: the longest row by itself is too much.
        """
        settings, device = self.settings, self.model.device
        if device.type not in budget.PROBED or settings.micro_batch_size is not None:
            return settings.token_budget
        passes = PlainPasses(self.model, self.task, self.scaler)

        def attempt(examples: Examples) -> None:
            loader = self.loader
            batch = build_batch(examples, groups=loader.groups, layout=loader.layout, pad_token_id=loader.pad_token_id)
            self.model.bank.refresh()
            passes(self.passes.prepare(batch), self.task.units(examples))
            self.model.bank.backpropagate()

        self.model.train()
        with self.running(), torch.random.fork_rng(self.model.devices if device.type == "cuda" else []):
            found = budget.fitting_budget(
                settings.token_budget,
                examples=self.loader.examples,
                global_batch_size=settings.global_batch_size,
                padded=settings.layout == "padded",
                attempt=attempt,
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.model.bank.zero_grad()
        self.settings = replace(settings, token_budget=found)
        self.loader.token_budget = found
        return found

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the model runs as the settings say: packed or padded, compiled or not."""
        with self.model.packing(self.settings.layout == "packed"):
            settings = self.settings
            with self.model.compiling(forgiving=settings.forgiving) if settings.compiled else nullcontext():
                yield

    def _loop(self) -> str:
        if self.progress.validation_is_due:
            if self._settle(validate=True, save=self._due(self.settings.save_every, self.progress.step), signal=None):
                return "patience"
        with self.loader.ahead(self._batches_left()) as batches:
            started = time.perf_counter()
            for batch in batches:
                loss, norm, rate = self._step(batch)
                self.progress.step += 1
                self._pending.append((self.progress.step, loss, batch.examples.rows.tolist()))
                self.progress.seconds += time.perf_counter() - started
                if self._end_of_step(norm, rate):
                    return "patience"
                started = time.perf_counter()
        return "finished"

    def _batches_left(self) -> Iterator[Sequence[int]]:
        """The examples of each step from the next one to the last."""
        epoch, permutation = -1, []
        for step in range(self.progress.step, self.steps):
            if step // self.order.steps_per_epoch != epoch:
                epoch = step // self.order.steps_per_epoch
                permutation = self.order.permutation(epoch)
            yield self.order.global_batch(step, permutation)

    def _step(self, batch: GlobalBatch) -> tuple[Tensor, Tensor, float]:
        """One optimizer step on a global batch: its mean loss, the gradient's norm, the learning rate."""
        settings, device = self.settings, self.model.device
        units = self.task.units(batch.examples)
        total = torch.zeros((), device=device)
        self.model.bank.refresh()
        seed_step(settings.seed, self.progress.step)
        passes = self._in_step(batch, units)
        meeting = self.references.of_step(batch.examples) if self.references is not None else nullcontext()
        with meeting, together():
            for each, share in passes:
                total += self.passes(each, share)
        self.progress.tokens += batch.examples.token_count
        self.model.bank.backpropagate()
        add_up([*all_gradients(self.model), total])
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            list(self.parameters.values()), settings.max_grad_norm or math.inf, foreach=True
        )
        rate = settings.learning_rate * rate_factor(
            self.progress.step,
            steps=self.steps,
            warmup_steps=min(math.ceil(settings.warmup_ratio * self.steps), self.steps - 1),  # one step has the peak
            schedule=settings.schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm, rate

    def _in_step(self, batch: GlobalBatch, units: int) -> list[tuple[Batch, float]]:
        """The passes, and what each loss is divided by.

        A sharded base is gathered by all processes at once, so each makes as many passes as any; those made for the
        others' sake count for nothing.
        """
        passes: list[tuple[Batch, float]] = [(each, units) for each in batch.passes]
        if not self.model.is_sharded:
            return passes
        missing = largest(len(passes)) - len(passes)
        return passes + [(self.loader.one(batch.indices[0]), math.inf)] * missing

    def _end_of_step(self, norm: Tensor, rate: float) -> bool:
        """Log, validate, save and watch, as far as each is due. True: patience has run out."""
        step = self.progress.step
        signal = self.hooks.signal()
        report = self._is_reported(step)
        if report or signal:
            self._look_at_losses(norm)
        if report:
            self._report_step(norm, rate)
        return self._settle(
            validate=self._validates(step), save=self._due(self.settings.save_every, step), signal=signal
        )

    def _settle(self, *, validate: bool, save: bool, signal: int | None) -> bool:
        """Validate, save and stop, as far as each is asked for. True: patience has run out.

        A validation may take longer than a scheduler waits: a signal cuts it short, and resuming makes it anew.
        """
        progress, asked = self.progress, signal if signal and Signals(signal).name != "SIGUSR1" else None
        try:
            if validate and asked:
                raise self._interrupted(asked)
            best = validate and self._validate()
        except Interrupted as stopped:
            progress.validation_is_due = True
            self._save()
            raise self._interrupted(stopped.signal) from None
        progress.validation_is_due = False
        if save or signal or best:
            self._save()
        if best:
            self.hooks.mark_best(progress.step)
        if asked and progress.step < self.steps:
            raise self._interrupted(asked)
        return bool(self.settings.patience) and progress.bad_validations >= (self.settings.patience or 0)

    def _interrupted(self, signal: int) -> Interrupted:
        return Interrupted(f"stopped by {Signals(signal).name} at step {self.progress.step}", signal=signal)

    def _due(self, every: int | Literal["epoch", "never"], step: int) -> bool:
        if every == "never":
            return False
        interval = self.order.steps_per_epoch if every == "epoch" else every
        return step % interval == 0 or step == self.steps

    def _validates(self, step: int) -> bool:
        return self.hooks.validate is not None and self._due(self.settings.validate_every, step)

    def _is_reported(self, step: int) -> bool:
        settings = self.settings
        return self._validates(step) or any(
            self._due(every, step) for every in (settings.save_every, settings.log_every)
        )

    def _look_at_losses(self, norm: Tensor) -> None:
        """Read the losses since the last look (one wait for the device) and stop if one is not finite or they exploded.

        Also if the last gradient is not finite, before the weights that it made are saved; float16 skips such a step.
        """
        losses = torch.stack([loss for _, loss, _ in self._pending]).tolist()
        for (step, _, rows), loss in zip(self._pending, losses, strict=True):
            progress = self.progress
            progress.recent_losses = [*progress.recent_losses, loss][-LOSS_WINDOW:]
            if progress.first_loss is None and len(progress.recent_losses) == BEGINNING:
                progress.first_loss = median(progress.recent_losses)
            fault = fault_of(progress.recent_losses, first=progress.first_loss, factor=self.settings.diverge_factor)
            if fault:
                raise self._diverged(fault, step, rows)
        if not (math.isfinite(length := norm.item()) or self.scaler.is_enabled()):
            step, _, rows = self._pending[-1]
            raise self._diverged(Fault(f"has a gradient of length {length}", 1), step, rows)
        self._pending.clear()

    def _diverged(self, fault: Fault, step: int, rows: Sequence[int]) -> Diverged:
        began = step - fault.lasts + 1
        where = f" since step {began}"
        if began == step:
            shown = ", ".join(map(str, sorted(rows)[:8])) + (", …" if len(rows) > 8 else "")
            where = f" (rows {shown})"
        return Diverged(
            f"loss {fault.words} at step {step}{where}, learning rate {self.settings.learning_rate:g}. "
            f"{self.hooks.last_good(began)} Try a lower train.learning_rate, or train.warmup_ratio: 0.1"
        )

    def _report_step(self, norm: Tensor, rate: float) -> None:
        progress = self.progress
        per_second = progress.tokens / max(progress.seconds, 1e-9)
        left = (self.steps - progress.step) * progress.seconds / max(progress.step, 1)
        gpus = [device for device in self.model.devices if device.type == "cuda"]
        memory = max(map(torch.cuda.max_memory_allocated, gpus)) if gpus else None
        since = next(step for step in range(progress.step - 1, -1, -1) if step == 0 or self._is_reported(step))
        losses = progress.recent_losses[since - progress.step :]
        record = StepRecord(
            step=progress.step,
            steps=self.steps,
            epoch=progress.step / self.order.steps_per_epoch,
            loss=sum(losses) / len(losses),
            learning_rate=rate,
            grad_norm=float(norm),
            tokens=progress.tokens,
            seconds=progress.seconds,
            tokens_per_second=per_second,
            eta_seconds=left,
            memory_bytes=memory,
        )
        self.observer.on_step(record)
        self.hooks.log(
            {
                "epoch": round(record.epoch, 4),
                "loss": record.loss,
                "learning_rate": rate,
                "grad_norm": record.grad_norm,
                "tokens": progress.tokens,
                "seconds": round(progress.seconds, 3),
            },
            progress.step,
        )

    def _validate(self) -> bool:
        """Score the validation rows; True if it is the best score yet."""
        assert self.hooks.validate is not None
        started = time.perf_counter()
        self.model.eval()
        with self.model.packing(False), torch.compiler.set_stance("force_eager"):  # decoding has other shapes each step
            metrics = self.hooks.validate()
        self.model.train()
        score, progress = metrics[self.settings.best_metric], self.progress
        known = progress.best_score
        better = known is None or (score < known if self.settings.lower_is_better else score > known)
        if better:
            progress.best_score, progress.best_step, progress.bad_validations = score, progress.step, 0
        else:
            progress.bad_validations += 1
        seconds = time.perf_counter() - started
        self.observer.on_evaluation(EvaluationRecord(progress.step, "validation", metrics, seconds, better))
        self.hooks.log({f"validation_{name}": value for name, value in metrics.items()}, progress.step)
        return better

    def _save(self) -> None:
        self.progress.loss_scale = self.scaler.state_dict()
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        state = capture_state(self.optimizer, names, self.model.devices)
        if self.references is not None:
            state[REFERENCES] = self.references.state()
        self.hooks.save(self.progress, state)
