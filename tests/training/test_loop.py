"""The loop on a tiny model: a step is AdamW by the book, and reports, validations, saving and patience come in time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import get_linear_schedule_with_warmup

from reft_cli.data.batch import Batch, build_batch
from reft_cli.data.examples import Example, Examples
from reft_cli.models.build import build_intervened
from reft_cli.models.intervened import IntervenedModel
from reft_cli.positions import Positions
from reft_cli.tasks.objectives import CausalLM
from reft_cli.training.loop import Hooks, Trainer, TrainSettings
from reft_cli.training.observer import NullObserver, StepRecord
from reft_cli.training.schedule import Order
from reft_cli.training.state import Progress
from tiny_models import base_of

GROUPS = Positions.parse("f2+l2").groups(tied=True)
SETTINGS = TrainSettings(
    epochs=3, max_steps=None, learning_rate=3e-2, schedule="linear", warmup_ratio=0.0, weight_decay=0.0,
    max_grad_norm=None, global_batch_size=4, micro_batch_size=None, token_budget=4096, layout="packed",
    compiled=False, forgiving=True, recorded=False, cached=False, shared=False, seed=5, log_every=1, diverge_factor=4.0,
    validate_every="never", save_every="epoch", patience=None, lower_is_better=False, best_metric="score",
)  # fmt: skip


def rows(count: int = 7) -> Examples:
    chance = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 200, (7 + row * row % 5,), generator=chance).tolist() for row in range(count)]
    return Examples.of(Example(each, 3 + row % 4, None, "", "", row) for row, each in enumerate(ids))


ROWS = rows()


def intervened(layers: str = "all") -> IntervenedModel:
    return build_intervened(
        base_of("llama"), method="loreft", layers=layers, component="block_output",
        positions=Positions.parse("f2+l2"), tied=True, rank=2, init="paper", dropout=0.0, dropout_on="delta", seed=0,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _model_as_it_was() -> Iterator[None]:
    yield
    base_of("llama").model.eval()


@dataclass
class Watching(NullObserver):
    """Keeps reports, and in their order what the loop asks for."""

    reports: list[StepRecord] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def on_step(self, record: StepRecord) -> None:
        self.reports.append(record)


def trainer(
    model: IntervenedModel,
    watching: Watching,
    *,
    scores: Iterator[float] | None = None,
    task: Any = None,
    **changed: Any,
) -> Trainer:
    def validate() -> dict[str, float]:
        watching.events.append("validate in training mode" if model.training else "validate")
        return {"score": next(scores)}  # type: ignore[arg-type]

    return Trainer(
        model,
        task=task or CausalLM(),
        examples=ROWS,
        groups=GROUPS,
        pad_token_id=1,
        settings=replace(SETTINGS, **changed),
        accelerator=SimpleNamespace(process_index=0, num_processes=1),  # type: ignore[arg-type]
        observer=watching,
        hooks=Hooks(
            validate=None if scores is None else validate,
            save=lambda progress, tensors: watching.events.append(f"save {progress.step}"),
            mark_best=lambda step: watching.events.append(f"best {step}"),
            log=lambda values, step: None,
            signal=lambda: None,
            last_good=lambda step: "",
        ),
    )


def by_the_book(
    settings: TrainSettings, steps: int
) -> tuple[list[tuple[float, float, float]], dict[str, torch.Tensor]]:
    """(loss, norm, rate) of each step and the weights after them: one row a pass, full logits, torch's own AdamW."""
    model = intervened().train()
    named = dict(model.bank.named_parameters())
    decayed, spared = [named["source_weight"]], [named["projection"], named["source_bias"]]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": spared, "weight_decay": 0.0}],
        lr=settings.learning_rate,
    )
    schedule = get_linear_schedule_with_warmup(optimizer, 3, steps)
    order, found = Order(len(ROWS), settings.global_batch_size, settings.seed), []
    with model:
        for step in range(steps):
            chosen = ROWS.take(order.global_batch(step, order.permutation(step // order.steps_per_epoch)))
            model.bank.refresh()
            tokens = sum(len(each.input_ids) - each.prompt_length for each in chosen)
            loss = 0.0
            for each in chosen:
                batch = build_batch([each], groups=GROUPS, layout="padded", pad_token_id=1)
                with model.editing(batch.rows):
                    logits = model.base_model(torch.tensor([each.input_ids])).logits[0]
                    answer = slice(each.prompt_length, None)
                    one = cross_entropy(logits[:-1][each.prompt_length - 1 :], torch.tensor(each.input_ids)[answer])
                    share = one * (len(each.input_ids) - each.prompt_length) / tokens
                    share.backward()
                loss += share.item()
            model.bank.backpropagate()
            norm = torch.cat([parameter.grad.flatten() for parameter in named.values()]).norm().item()
            for parameter in named.values():
                parameter.grad *= min(1.0, (settings.max_grad_norm or norm) / norm)
            found.append((loss, norm, optimizer.param_groups[0]["lr"]))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return found, {name: parameter.detach() for name, parameter in named.items()}


def test_a_run_of_one_step_learns_in_spite_of_a_warm_up():
    """The warm-up's first rate is 0, and it was the only one."""
    model, watching = intervened(), Watching()
    with model:
        trainer(model, watching, max_steps=1, warmup_ratio=0.1, log_every=1).run({})
    assert [report.learning_rate for report in watching.reports] == [3e-2]


@pytest.mark.parametrize(
    ("layout", "cut", "clip", "scaled"),
    [("packed", 1, None, False), ("padded", 3, 0.05, False), ("packed", None, 0.05, True)],
)
def test_steps_are_adamw_on_the_mean_over_the_answer_tokens(
    monkeypatch: pytest.MonkeyPatch, layout: str, cut: int | None, clip: float | None, scaled: bool
):
    """Of global batches of 4 and 3 rows, however they are cut; warm-up over ceil(0.4 · 6) steps."""
    if scaled:  # as for float16
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler)
    model, watching = intervened(), Watching()
    given = {"weight_decay": 0.5, "warmup_ratio": 0.4, "max_grad_norm": clip}
    with model:
        loop = trainer(model, watching, layout=layout, micro_batch_size=cut, **given)
        assert loop.run({}) == "finished"
    wanted, weights = by_the_book(replace(SETTINGS, **given), 6)
    assert clip is None or all(norm > 2 * clip for _, norm, _ in wanted)
    reports = watching.reports
    found = [(each.loss, each.grad_norm, each.learning_rate) for each in reports]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(model.bank.named_parameters()), weights, rtol=1e-3, atol=1e-4)
    losses = [each.loss for each in reports]
    assert (loop.progress.recent_losses, loop.progress.first_loss) == (losses, median(losses[:5]))
    tokens = int(ROWS.lengths.sum())
    assert [each.tokens for each in reports[1::2]] == [tokens, 2 * tokens, 3 * tokens]
    assert [(each.step, each.steps, each.epoch) for each in reports] == [(n, 6, n / 2) for n in range(1, 7)]


def test_the_loss_of_a_report_is_the_mean_since_the_last_one():
    """Of 6 steps, those that end an epoch and every fourth are reported."""
    each, some = Watching(), Watching()
    for watching, every in ((each, 1), (some, 4)):
        model = intervened()
        with model:
            trainer(model, watching, log_every=every).run({})
    losses = [report.loss for report in each.reports]
    assert [report.step for report in some.reports] == [2, 4, 6]
    assert [report.loss for report in some.reports] == pytest.approx([sum(losses[n : n + 2]) / 2 for n in (0, 2, 4)])
    second = each.reports[1]
    assert second.tokens_per_second == pytest.approx(second.tokens / second.seconds)
    assert [report.eta_seconds for report in each.reports] == pytest.approx(
        [(6 - report.step) * report.seconds / report.step for report in each.reports]
    )


class Noting(CausalLM):
    """Notes in which mode the model is in each pass."""

    modes: set[bool] = set()  # noqa: RUF012  shared on purpose

    def loss(self, model: IntervenedModel, batch: Batch) -> torch.Tensor:
        self.modes.update(module.training for module in model.modules())
        return super().loss(model, batch)


SCORED = {"validate_every": 1, "save_every": 3, "epochs": 4}


@pytest.mark.parametrize(
    ("lower", "patience", "scores", "saved", "best", "reason"),
    [
        (False, None, (0.5, 0.6, 0.6, 0.4, 0.7, 0.0, 0.1, 0.2), {1, 2, 3, 5, 6, 8}, [1, 2, 5], "finished"),
        (False, 2, (0.5, 0.6, 0.5, 0.7, 0.7, 0.6), {1, 2, 3, 4, 6}, [1, 2, 4], "patience"),
        (True, 3, (0.5, 0.6, 0.4, 0.4, 0.5, 0.7), {1, 3, 6}, [1, 3], "patience"),
    ],
)
def test_the_best_score_is_saved_and_marked_and_patience_counts_from_it(
    lower: bool, patience: int | None, scores: tuple[float, ...], saved: set[int], best: list[int], reason: str
):
    """A score that is only as good is not better. Dropout is on in passes, from the first on, and off in validation."""
    model, watching = intervened().eval(), Watching()
    Noting.modes.clear()
    given = SCORED | {"lower_is_better": lower, "patience": patience, "task": Noting()}
    loop = trainer(model, watching, scores=iter(scores), **given)
    with model:
        assert loop.run({}) == reason
    wanted = []
    for step in range(1, len(scores) + 1):
        wanted += ["validate", *[f"save {step}"] * (step in saved), *[f"best {step}"] * (step in best)]
    assert watching.events == wanted and Noting.modes == {True}
    left = loop.progress
    assert (left.best_score, left.best_step) == (scores[best[-1] - 1], best[-1])
    assert left.bad_validations == len(scores) - best[-1]


def test_kept_activations_are_taken_from_the_second_epoch_on():
    """The first block, which no edit reaches, runs in the two steps of the first of three epochs only."""
    model, watching, ran = intervened("1;2"), Watching(), []
    loop = trainer(model, watching, cached=True)
    with model, model.base_model.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append(loop.progress.step)):
        loop.run({})
    assert set(ran) == {0, 1} and loop.progress.step == 6


@pytest.mark.parametrize(
    ("bad", "reason", "events"),
    [
        (0, "finished", ["validate", "save 3", "validate", "save 4", "best 4"]),
        (1, "patience", ["validate", "save 3"]),
    ],
)
def test_a_validation_that_was_cut_short_is_made_first_and_its_checkpoint_saved_again(
    bad: int, reason: str, events: list[str]
):
    model, watching = intervened(), Watching()
    loop = trainer(model, watching, scores=iter([0.5, 0.9]), **SCORED | {"max_steps": 4, "patience": 2})
    known = Progress(step=3, best_score=0.8, best_step=2, bad_validations=bad, validation_is_due=True)
    loop.resume(known, {"rng.cpu": torch.get_rng_state()})
    with model:
        assert loop.run({}) == reason
    assert watching.events == events and not loop.progress.validation_is_due


def test_the_float16_loss_scale_is_saved_and_resumed(monkeypatch: pytest.MonkeyPatch):
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for scale in (2.0**10, 2.0**4)]
    waiting = iter(scalers)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: next(waiting))
    model = intervened()
    first, second = (trainer(model, Watching(), max_steps=2) for _ in scalers)
    with model:
        first.run({})
    second.resume(first.progress, {"rng.cpu": torch.get_rng_state()})
    assert scalers[1].state_dict() == scalers[0].state_dict() and scalers[1].get_scale() == 2.0**10
