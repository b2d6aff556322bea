"""Scores an intervened model, or its base, on examples: the loss, a prediction for every row, and a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from reft_cli.data.batch import Batch, Layout, build_batch, micro_batches
from reft_cli.data.encode import Example
from reft_cli.data.fitting import check_fits
from reft_cli.evaluation.answers import answer_all
from reft_cli.evaluation.extraction import Rule
from reft_cli.evaluation.metrics import FROM_LOSS, by_source, score_classes, score_loss, score_numbers, score_texts
from reft_cli.evaluation.pairs import pair_samples, score_pairs
from reft_cli.generation.decode import Decoder, requests_of
from reft_cli.generation.settings import Answer, Decoding
from reft_cli.models.intervened import IntervenedModel
from reft_cli.parallel.collective import separately, share, size, spread, together, total
from reft_cli.positions import PositionGroup
from reft_cli.tasks.objectives import HEADS, predict
from reft_cli.tasks.preferences import PairTask, Preference, pair_loss, pair_task_of, task_of

Progress = Callable[[int, int], None]
Tokens = tuple[int, ...]
References = dict[tuple[Tokens, Tokens], list[float]]  # by the tokens of a pair: log-probabilities of its answers


def cost_of(example: Example) -> int:
    """What a row costs, by which rows are shared out over processes."""
    return len(example.input_ids)


def content_of(pair: Example) -> tuple[Tokens, Tokens]:
    """The tokens of both sequences of a pair."""
    assert pair.rejected is not None, "a pair"
    return tuple(pair.input_ids), tuple(pair.rejected.input_ids)


@dataclass(frozen=True)
class Evaluation:
    """Scores by name, and for each row what was predicted, in the order of the rows."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class Evaluator:
    """How a split is scored; flat values that training and `reft eval` share."""

    kind: str
    metric: str
    labels: list[str] | None
    groups: tuple[PositionGroup, ...]
    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding
    batch_size: int | None
    token_budget: int
    layout: Layout = "padded"
    """Of the rows that are read. What a head judges stands in rows of its own: padded."""
    shared: bool = False
    """Whether a head that rows of a pass begin with alike is read once; packed only."""
    beta: float | None = None
    """Of a preference task."""
    references: References | None = None
    """Of a preference task: where to keep what the base gives each pair, if rows are scored more than once."""
    rule: Rule | None = None
    """How the answer is found in generated text; None: all of it is the answer."""
    reads_loss: bool = True
    """Whether rows that are answered are also read for their loss, a second pass over them; other metrics have it."""

    @property
    def generates(self) -> bool:
        """Whether rows are answered, and not only read."""
        return self.kind == "causal_lm" and self.metric not in FROM_LOSS

    @property
    def new_tokens(self) -> int:
        """Tokens that may be generated for a row."""
        return self.decoding.max_new_tokens if self.generates else 0

    def run(
        self,
        model: IntervenedModel,
        examples: Sequence[Example],
        *,
        prompts: Sequence[Example],
        edited: bool = True,
        answers: Sequence[Answer] | None = None,
        on_progress: Progress | None = None,
    ) -> Evaluation:
        """Score examples; `prompts` are the same rows without their answers, `answers` what was decoded for them
        already (causal_lm only, both).

        DataError: one is longer than the model has positions for.
        """
        check_fits(examples, model.base_model, name="row", new_tokens=self.new_tokens)
        examples = list(examples)  # columns would make each anew, and what is found of one is kept by its identity
        tell = on_progress or (lambda done, total: None)
        with separately(model.is_sharded):  # its parts are gathered in step, so everyone scores every row
            if self.kind == "causal_lm":
                return self._causal(model, examples, prompts, edited, answers, tell)
            task = pair_task_of(self.kind, beta=self.beta)
            if task is not None:
                return self._pairs(task, model, examples, edited, tell)
            return self._head(model, examples, edited, tell)

    def _causal(
        self,
        model: IntervenedModel,
        examples: Sequence[Example],
        prompts: Sequence[Example],
        edited: bool,
        answers: Sequence[Answer] | None,
        tell: Progress,
    ) -> Evaluation:
        metrics: dict[str, float] = {}
        if self.reads_loss or not self.generates:
            metrics["loss"] = self._mean_loss(model, examples, edited, tell)
        samples: list[dict[str, Any]] = [
            {"row": each.row, "prompt": each.prompt, "reference": _reference(each)} for each in examples
        ]
        if self.metric in FROM_LOSS:
            return Evaluation(metrics | {self.metric: score_loss(self.metric, metrics["loss"])}, samples)
        if answers is None:
            answers = answer_all(
                Decoder.of(model, self.groups, tokenizer=self.tokenizer),
                requests_of(prompts, member=int(edited)),
                decoding=replace(self.decoding, compile="off"),  # it would move weights that training has recorded
                batch_size=self.batch_size,
                on_progress=lambda done: tell(done, len(prompts)),
            )
        for sample, answer in zip(samples, answers, strict=True):
            sample |= {"prediction": answer.text, "finished": answer.finished}
        guesses, truths = self._compared([answer.text for answer in answers], examples)
        if self.rule is not None:
            for sample, guess, truth in zip(samples, guesses, truths, strict=True):
                sample |= {"answer": guess, "reference": truth}

        def score(rows: list[int]) -> float:
            return score_texts(self.metric, [guesses[row] for row in rows], [truths[row] for row in rows])

        return Evaluation(metrics | by_source(self.metric, [each.source for each in examples], score), samples)

    def _compared(self, texts: Sequence[str], examples: Sequence[Example]) -> tuple[list[str], list[str]]:
        """(answers, references) as they are scored; a reference of its own is taken as it is."""
        if self.rule is None:
            return list(texts), [_reference(each) for each in examples]
        rule, truths = self.rule, []
        for each in examples:
            own = rule.find(each.completion, reference=each.completion) or each.completion
            truths.append(own if each.reference is None else each.reference)
        return [rule.find(text, reference=truth.strip()) for text, truth in zip(texts, truths, strict=True)], truths

    @torch.inference_mode()
    def _pairs(
        self, task: PairTask, model: IntervenedModel, examples: Sequence[Example], edited: bool, tell: Progress
    ) -> Evaluation:
        losses = [0.0]

        def rewards_of(mine: list[Example]) -> list[list[float]]:
            rewards: dict[int, list[float]] = {}
            for chosen, batch in self._batches(model, mine):
                batch = self._told(task, model, chosen, batch)
                with model.editing(batch.rows if edited else None):
                    found = task.rewards(model, batch)  # [P, 2]
                losses.append(float(pair_loss(found)))
                rewards |= {id(example): pair for example, pair in zip(chosen, found.tolist(), strict=True)}
                tell(min(len(rewards) * size(), len(examples)), len(examples))
            return [rewards[id(example)] for example in mine]

        with self._packing(model):
            pairs = spread(examples, rewards_of, cost=cost_of)
        loss = total(sum(losses))
        return Evaluation(
            {"loss": loss / task.units(examples)} | score_pairs(examples, pairs), pair_samples(examples, pairs)
        )

    def _told(self, task: PairTask, model: IntervenedModel, chosen: Sequence[Example], batch: Batch) -> Batch:
        """The batch of these pairs with their reference, where it is kept; read now if it is not known yet."""
        if self.references is None or not isinstance(task, Preference):
            return batch
        keys = [content_of(example) for example in chosen]
        if not all(key in self.references for key in keys):
            with model.editing(None):
                found = task.reference(model, batch)  # [P, 2]
            self.references.update(zip(keys, found.tolist(), strict=True))
        known = torch.tensor([self.references[key] for key in keys], device=model.device)
        return replace(batch, reference=known)

    @torch.inference_mode()
    def _head(self, model: IntervenedModel, examples: Sequence[Example], edited: bool, tell: Progress) -> Evaluation:
        task, losses = HEADS[self.kind], [0.0]

        def outputs_of(mine: list[Example]) -> list[list[float]]:
            outputs: dict[int, list[float]] = {}
            for chosen, batch in self._batches(model, mine):
                with model.editing(batch.rows if edited else None):
                    numbers_of = predict(model, batch)  # [B, C]
                losses.append(float(task.loss_of(numbers_of, batch)))
                for example, values in zip(chosen, numbers_of.tolist(), strict=True):
                    outputs[id(example)] = values
                tell(min(len(outputs) * size(), len(examples)), len(examples))
            return [outputs[id(example)] for example in mine]

        rows = spread(examples, outputs_of, cost=cost_of)
        metrics = {"loss": total(sum(losses)) / task.units(examples)}
        found: list[Any]
        wanted: list[Any]
        score: Callable[[list[Any], list[Any]], float]
        names = self.labels or []
        if self.kind == "regression":
            found, wanted = [values[0] for values in rows], [float(each.label or 0) for each in examples]
            score = partial(score_numbers, self.metric)
        else:
            found = [max(range(len(values)), key=values.__getitem__) for values in rows]
            wanted = [int(each.label or 0) for each in examples]
            score = partial(score_classes, self.metric, classes=len(names))
        if self.metric not in FROM_LOSS:
            metrics |= by_source(
                self.metric,
                [each.source for each in examples],
                lambda rows: score([found[row] for row in rows], [wanted[row] for row in rows]),
            )
        if self.kind != "regression":
            found, wanted = [names[each] for each in found], [names[each] for each in wanted]
        samples = [
            {"row": each.row, "prompt": each.prompt, "reference": truth, "prediction": guess}
            for each, truth, guess in zip(examples, wanted, found, strict=True)
        ]
        return Evaluation(metrics, samples)

    @torch.inference_mode()
    def _mean_loss(self, model: IntervenedModel, examples: Sequence[Example], edited: bool, tell: Progress) -> float:
        """The objective's mean over all units of these rows; rows that are answered next count as none done."""
        task, loss, read = task_of(self.kind, beta=self.beta), 0.0, 0
        with self._packing(model), together():
            for chosen, batch in self._batches(model, share(examples, cost=cost_of)):
                with model.editing(batch.rows if edited else None):
                    loss += float(task.loss(model, batch))
                read += 0 if self.generates else len(chosen)
                tell(min(read * size(), len(examples)), len(examples))
        return total(loss) / task.units(examples)

    def _packing(self, model: IntervenedModel) -> AbstractContextManager[None]:
        return model.packing(self.layout == "packed")

    def _batches(self, model: IntervenedModel, examples: Sequence[Example]) -> Iterator[tuple[list[Example], Batch]]:
        padded = self.layout == "padded"
        for chosen in micro_batches(examples, token_budget=self.token_budget, rows=None, padded=padded):
            batch = build_batch(
                chosen,
                groups=self.groups,
                layout=self.layout,
                pad_token_id=self.tokenizer.pad_token_id or 0,
                share_head=self.shared,
            )
            yield chosen, batch.to(model.device)


def _reference(example: Example) -> str:
    return example.completion if example.reference is None else example.reference
