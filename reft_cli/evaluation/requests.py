"""Answers requests of lm-evaluation-harness: the log-likelihood of a continuation, and text up to a stop.

Edits go by where the context ends, which every request says; neither the continuation, nor padding, nor what else is in
the batch moves them. lm-eval itself is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from reft_cli.data.batch import build_batch, micro_batches
from reft_cli.data.examples import Example
from reft_cli.data.heads import cut_alike
from reft_cli.data.tokens import text_tokenizer
from reft_cli.errors import DataError, SpecError
from reft_cli.evaluation.answers import answer_all
from reft_cli.generation.decode import Decoder
from reft_cli.generation.settings import Decoding, Request
from reft_cli.models.context import longest_sequence
from reft_cli.models.intervened import IntervenedModel
from reft_cli.models.packing import why_not_packed, why_not_shared
from reft_cli.models.placement import is_spread
from reft_cli.positions import PositionGroup
from reft_cli.tasks.likelihood import likelihoods

UNKNOWN_LENGTH = 2048  # tokens that a model takes whose configuration does not say; lm-eval's own number
LENGTH_NAMES = ("n_positions", "max_position_embeddings", "n_ctx")
BATCH = 32  # sequences read in a pass if nobody says how many
MOST_NEW_TOKENS = 256  # where a task does not say; lm-eval's own number
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one setting
SETTINGS = {
    "top_p": "top_p",
    "top_k": "top_k",
    "num_beams": "beams",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "min_new_tokens": "min_new_tokens",
}


@dataclass(frozen=True)
class Continuation:
    """Tokens of a context and of what may follow it. `prompted`: the context is a prompt, and no mere start token."""

    context: list[int]
    continuation: list[int]
    prompted: bool = True


@dataclass(frozen=True)
class Likelihood:
    """Σ log p of a continuation in nats, and whether greedy decoding would write it."""

    log_probability: float
    greedy: bool


@dataclass
class Requests:
    """Answers requests with one model. `edited` is false for its base.

    Where there is no prompt (perplexity of a text, an empty context), edits of prompt tokens have nowhere to be and the
    base is scored; `unprompted` counts such requests.
    """

    model: IntervenedModel
    decoder: Decoder
    groups: tuple[PositionGroup, ...]
    tokenizer: PreTrainedTokenizerBase
    batch_size: int | None
    """Sequences in a pass; None: as many as are good."""
    edited: bool = True
    on_progress: Callable[[int, int], None] = field(default=lambda done, total: None)
    unprompted: int = 0
    answered: int = 0

    @property
    def max_length(self) -> int:
        """Tokens that the model takes at once."""
        config = self.model.base_model.config
        said = next((getattr(config, name) for name in LENGTH_NAMES if getattr(config, name, None)), UNKNOWN_LENGTH)
        return min(int(said), longest_sequence(self.model.base_model) or int(said))

    def ids(self, text: str, *, special: bool) -> list[int]:
        """Tokens of a text; `special`: after the tokenizer's own first tokens, unless the text has them already."""
        part = text_tokenizer(self.tokenizer)
        ids, prefix = part.ids([text])[0], part.prefix
        return prefix + ids if special and ids[: len(prefix)] != prefix else ids

    def likelihoods(self, requests: Sequence[Continuation]) -> list[Likelihood]:
        """In the order of the requests. A context that is too long loses its beginning, as lm-eval has it."""
        found, total = dict[int, Likelihood](), self.answered + len(requests)
        for prompted in (True, False):
            examples = [
                self._example(request, number)
                for number, request in enumerate(requests)
                if request.prompted == prompted and request.continuation
            ]
            groups = [group for group in self.groups if prompted or group.phase != "prompt"] if self.edited else []
            with self.model.packing(True) if self._shares_heads else nullcontext():
                for chosen in self._passes(examples):
                    found |= self._scored(chosen, groups)
                    self._count(len(chosen), total)
        self.unprompted += sum(not request.prompted for request in requests)
        return [found.get(number, Likelihood(0.0, True)) for number in range(len(requests))]

    def _passes(self, examples: Sequence[Example]) -> Iterable[list[Example]]:
        rows = self.batch_size or BATCH
        if self._shares_heads:
            return cut_alike(examples, rows=rows)
        return micro_batches(examples, token_budget=0, rows=rows, padded=True)

    @cached_property
    def _shares_heads(self) -> bool:
        """Whether contexts that begin alike are read once; found by trying the model."""
        base = self.model.base_model
        return not is_spread(base) and why_not_shared(base) is None and why_not_packed(base) is None

    def _example(self, request: Continuation, number: int) -> Example:
        """The last token is a target only, so that there may be one more than the model takes."""
        ids, answer = request.context + request.continuation, len(request.continuation)
        if answer > self.max_length:
            raise DataError(f"a continuation of {answer:,} tokens is more than the {self.max_length:,} the model takes")
        kept = ids[-(self.max_length + 1) :]
        return Example(kept, len(kept) - answer, None, "", "", number)

    def _scored(self, examples: Sequence[Example], groups: Sequence[PositionGroup]) -> dict[int, Likelihood]:
        shared = self._shares_heads
        batch = build_batch(
            examples,
            groups=groups,
            layout="packed" if shared else "padded",
            pad_token_id=self.tokenizer.pad_token_id or 0,
            share_head=shared,
        ).to(self.model.device)
        with self.model.editing(batch.rows):
            chosen, hits = likelihoods(self.model, batch)
        sizes = [example.learned for example in examples]
        parts = zip(examples, chosen.double().split(sizes), hits.split(sizes), strict=True)
        return {example.row: Likelihood(float(part.sum()), bool(hit.all())) for example, part, hit in parts}

    def generate(self, contexts: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
        """Texts after each context, without the stop. SpecError: a setting that is not known."""
        plans = [_decoding(each) for each in settings]
        answers, total = dict[int, str](), self.answered + len(contexts)
        for plan in dict.fromkeys(plans):
            numbers = [number for number, each in enumerate(plans) if each == plan]
            prompts = [self._prompt(contexts[number], plan) for number in numbers]
            done = answer_all(self.decoder, prompts, decoding=plan, batch_size=self.batch_size)
            answers |= {number: answer.text for number, answer in zip(numbers, done, strict=True)}
            self._count(len(numbers), total)
        return [answers[number] for number in range(len(contexts))]

    def _prompt(self, context: str, plan: Decoding) -> Request:
        room = self.max_length - plan.max_new_tokens
        if room < 1:
            raise DataError(
                f"a task writes up to {plan.max_new_tokens:,} tokens, and the model takes {self.max_length:,} in all"
            )
        return Request(self.ids(context, special=True)[-room:], int(self.edited))

    def _count(self, more: int, total: int) -> None:
        self.answered += more
        self.on_progress(self.answered, total)


def _decoding(settings: Mapping[str, Any]) -> Decoding:
    """A task's generation_kwargs as ours. Without do_sample, a temperature means sampling; with false, none."""
    given = {name: value for name, value in settings.items() if value is not None}
    until = given.pop("until", [])
    limits = [given.pop(name) for name in LIMITS if name in given]
    temperature = float(given.pop("temperature", 0.0))
    sampling = given.pop("do_sample", temperature > 0)
    given.pop("use_cache", None)
    unknown = [name for name in given if name not in SETTINGS]
    if unknown:
        raise SpecError(
            f"a task sets {unknown[0]} for generation, which reft does not know; it knows until, do_sample, "
            f"temperature, {', '.join((*LIMITS, *SETTINGS))}"
        )
    return Decoding(
        max_new_tokens=int(limits[0]) if limits else MOST_NEW_TOKENS,
        temperature=(temperature or 1.0) if sampling else 0.0,
        stop=tuple(filter(None, [until] if isinstance(until, str) else until)),
        **{SETTINGS[name]: value for name, value in given.items()},
    )
