"""What scripts/bench/study.py puts beside reft's methods: LoRA, a linear probe, the frozen model and the majority.

Each side takes a run's spec, reads the rows that reft would read, and gives the scores of the two parts of its test
rows by their names. Shapes: B rows, T tokens, K answer tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from reft_cli.data.batch import build_batch, micro_batches
from reft_cli.data.examples import Example
from reft_cli.evaluation.metrics import by_source, score_texts
from reft_cli.models.loading import BaseModel, load_tokenizer
from reft_cli.runs.assemble import (
    base_source,
    best_metric,
    build_from_spec,
    decoding_of,
    evaluator_of,
    load_base,
)
from reft_cli.runs.sources import rows_of
from reft_cli.runs.texts import TextSide, load_training_data, without_answers
from reft_cli.spec.load import LoadedSpec
from reft_cli.spec.schema import Spec
from reft_cli.tasks.likelihood import likelihoods
from reft_cli.training.schedule import Order, rate_factor

BUDGET = 8192  # tokens of a pass of the frozen model
PENALTIES = [10.0**power for power in range(-4, 2)]  # the probe's C


@dataclass(frozen=True)
class Work:
    """What a side works on."""

    spec: Spec
    text: TextSide
    learned: list[Example]
    scored: list[Example]
    base: BaseModel

    @classmethod
    def of(cls, loaded: LoadedSpec) -> Work:
        """The rows and the base model of a spec."""
        source = base_source(loaded.spec.model)
        data = load_training_data(loaded.spec, load_tokenizer(source))
        scored = data.text.encode(rows_of(loaded.spec, "test")).examples
        base = load_base(source, data.text, seed=0)
        return cls(loaded.spec, data.text, list(data.train.examples), list(scored), base)

    @property
    def device(self) -> torch.device:
        """Where the base model is."""
        return next(self.base.model.parameters()).device

    @property
    def pad_token_id(self) -> int:
        """The token that fills batches up."""
        return self.text.tokenizer.pad_token_id or 0

    def scores(self, guesses: Sequence[str]) -> dict[str, float]:
        """The score of each part, of guessed labels."""
        metric, truths = str(self.spec.task.metric), list(map(label_of, self.scored))

        def score(rows: list[int]) -> float:
            return score_texts(metric, [guesses[at] for at in rows], [truths[at] for at in rows])

        return parts(by_source(metric, [each.source for each in self.scored], score))


def parts(metrics: dict[str, float]) -> dict[str, float]:
    """`metric/name` as name."""
    return {name.partition("/")[2]: value for name, value in metrics.items() if "/" in name}


def label_of(example: Example) -> str:
    """The answer as text, or the class's number."""
    return example.completion.strip() if example.label is None else str(example.label)


def lora(loaded: LoadedSpec, rank: int) -> dict[str, Any]:
    """PEFT's LoRA on the batches and with the schedule that reft would take; its merged weights answer."""
    import peft

    work, train = Work.of(loaded), loaded.spec.train
    torch.manual_seed(train.seed)
    asked = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    adapted = peft.get_peft_model(work.base.model, asked).train()
    weights = [each for each in adapted.parameters() if each.requires_grad]
    optimizer = AdamW(weights, lr=train.learning_rate, weight_decay=train.weight_decay)
    order = Order(len(work.learned), train.global_batch_size, train.seed)
    steps = order.steps(train.epochs, train.max_steps)
    warmup = math.ceil(train.warmup_ratio * steps)
    for step in range(steps):
        permutation = order.permutation(step // order.steps_per_epoch)
        chosen = [work.learned[index] for index in order.global_batch(step, permutation)]
        batch = build_batch(chosen, groups=(), layout="padded", pad_token_id=work.pad_token_id).to(work.device)
        logits = adapted(**batch.inputs, use_cache=False).logits.flatten(0, 1)[batch.answer_rows]  # [K, V]
        cross_entropy(logits.float(), batch.targets).backward()
        clip_grad_norm_(weights, train.max_grad_norm or math.inf)
        for group in optimizer.param_groups:
            factor = rate_factor(step, steps=steps, warmup_steps=warmup, schedule=train.schedule)
            group["lr"] = train.learning_rate * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    count = sum(each.numel() for each in weights)
    merged = replace(work.base, model=adapted.merge_and_unload().eval())
    return {"trainable": count, "devices": [work.device.type], **_answered(replace(work, base=merged))}


def _answered(work: Work) -> dict[str, float]:
    """The scores of a base model by generation."""
    model = build_from_spec(work.base, work.spec)
    evaluator = evaluator_of(
        work.text,
        model=model,
        metric=best_metric(work.spec),
        decoding=decoding_of(work.spec.generation),
        batch_size=None,
    )
    with model:
        found = evaluator.run(model, work.scored, prompts=without_answers(work.scored), edited=False)
    return parts(found.metrics)


def probe(loaded: LoadedSpec, _: int) -> dict[str, Any]:
    """A linear probe of the last hidden state at the last prompt token."""
    work = Work.of(loaded)
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier = GridSearchCV(regression, {"logisticregression__C": PENALTIES}, cv=3)
    classifier.fit(_last_states(work, work.learned), list(map(label_of, work.learned)))
    return work.scores(classifier.predict(_last_states(work, work.scored)).tolist())


@torch.inference_mode()
def _last_states(work: Work, examples: Sequence[Example]) -> np.ndarray:
    """The last hidden state at the last prompt token of every row, [rows, D]."""
    found: dict[int, np.ndarray] = {}
    prompts = without_answers(examples)
    for chosen in micro_batches(prompts, token_budget=BUDGET, rows=None, padded=True):
        batch = build_batch(chosen, groups=(), layout="padded", pad_token_id=work.pad_token_id).to(work.device)
        states = work.base.model.base_model(**batch.inputs).last_hidden_state.float()  # [B, T, D]
        for example, row in zip(chosen, states, strict=True):
            found[id(example)] = row[example.prompt_length - 1].cpu().numpy()
    return np.stack([found[id(each)] for each in prompts])


def majority(loaded: LoadedSpec, _: int) -> dict[str, Any]:
    """The most frequent label of the training rows."""
    work = Work.of(loaded)
    most = Counter(map(label_of, work.learned)).most_common(1)[0][0]
    return work.scores([most] * len(work.scored))


def frozen(loaded: LoadedSpec, _: int) -> dict[str, Any]:
    """The likelier one of all labels, end token included, under the frozen model."""
    work = Work.of(loaded)
    answers = {label_of(each): each.input_ids[each.prompt_length :] for each in work.learned}
    chances = {label: _chances(work, answer) for label, answer in answers.items()}
    return work.scores([max(chances, key=lambda label: chances[label][at]) for at in range(len(work.scored))])


@torch.inference_mode()
def _chances(work: Work, answer: list[int]) -> list[float]:
    """log p(answer | prompt) of every row under the frozen model."""
    model, found = build_from_spec(work.base, work.spec), [0.0] * len(work.scored)
    asked = [
        replace(each, input_ids=each.input_ids[: each.prompt_length] + answer, row=at)
        for at, each in enumerate(work.scored)
    ]
    with model, model.editing(None):
        for chosen in micro_batches(asked, token_budget=BUDGET, rows=None, padded=True):
            batch = build_batch(chosen, groups=(), layout="padded", pad_token_id=work.pad_token_id).to(work.device)
            sums = likelihoods(model, batch)[0].view(len(chosen), len(answer)).sum(1)  # [B]
            for each, chance in zip(chosen, sums.tolist(), strict=True):
                found[each.row] = chance
    return found


SIDES: dict[str, Callable[[LoadedSpec, int], dict[str, Any]]] = {
    "lora": lora,
    "probe": probe,
    "majority": majority,
    "frozen": frozen,
}
