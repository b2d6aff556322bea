"""The next token out of logits: transformers' processors, then the most probable token or a drawn one.

A draw needs one random number a row, which follows from the row's own stream and how many tokens it has: no batch, slot
or order changes it, and no generator's state has to be kept. Everything is of fixed shape and stays on the device.

Shapes: B rows, V vocabulary, L tokens that a row may have.
"""

from __future__ import annotations

from collections.abc import Collection
from math import gcd

import torch
from torch import Tensor

from reft_cli.generation.settings import Decoding

# The finaliser of the SplitMix64 generator: a counter times the golden ratio, mixed by two rounds (public domain).
GOLDEN, ROUNDS = -0x61C8864680B583EB, ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))
PARTS = 256  # of a row of scores, if so many are of one size
BITS = 53  # of a float64's mantissa


class Chooser:
    """Picks tokens as the settings of a decoding say."""

    def __init__(self, decoding: Decoding, *, ends: Collection[int], device: torch.device) -> None:
        self.decoding = decoding
        self._ends = torch.tensor(sorted(ends), dtype=torch.long, device=device)
        self._penalty = None
        self._warpers = []
        if decoding.repetition_penalty != 1:
            from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

            self._penalty = RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty)
        if decoding.temperature > 0:
            from transformers.generation import logits_process

            self._warpers = [logits_process.TemperatureLogitsWarper(decoding.temperature)]
            if decoding.top_k:
                self._warpers.append(logits_process.TopKLogitsWarper(decoding.top_k))
            if decoding.top_p < 1:
                self._warpers.append(logits_process.TopPLogitsWarper(decoding.top_p))

    @property
    def reads_the_past(self) -> bool:
        """Whether it needs to know the tokens that stand already."""
        return self._penalty is not None or self.decoding.no_repeat_ngram_size > 0

    def scores(self, logits: Tensor, *, past: Tensor | None, held: Tensor, count: Tensor) -> Tensor:
        """What is chosen by [B, V], -inf for what cannot be; `past` [B, L] holds `held` [B] tokens a row."""
        scores = logits.float() if past is not None or self.decoding.temperature > 0 else logits
        if past is not None:
            there = torch.arange(past.shape[1], device=past.device) < held[:, None]  # [B, L]
            if self._penalty is not None:
                scores = self._penalty(torch.where(there, past, past[:, :1]), scores)
            if self.decoding.no_repeat_ngram_size:
                scores = ban_repeats(scores, past, held, size=self.decoding.no_repeat_ngram_size)
        if self.decoding.min_new_tokens and len(self._ends):
            early = (count < self.decoding.min_new_tokens)[:, None]
            ends = scores.index_select(1, self._ends).masked_fill(early, float("-inf"))
            scores = scores.index_copy(1, self._ends, ends)
        for warper in self._warpers:
            scores = warper(past, scores)
        return scores

    def choose(self, logits: Tensor, *, past: Tensor | None, held: Tensor, count: Tensor, stream: Tensor) -> Tensor:
        """The next token [B] of each row; `count` [B] tokens of it are new, `stream` [B] begins its random numbers."""
        scores = self.scores(logits, past=past, held=held, count=count)
        return draw(scores.softmax(-1), uniform(stream, count)) if self.decoding.temperature > 0 else highest(scores)

    def ended(self, tokens: Tensor) -> Tensor:
        """Which of tokens [B] end an answer."""
        return (tokens[:, None] == self._ends).any(-1)


def ban_repeats(scores: Tensor, past: Tensor, held: Tensor, *, size: int) -> Tensor:
    """-inf for every token that would complete a run of `size` tokens that stands in its row already.

    transformers has this rule as loops over lists on the host, which would wait for the device at every step.
    """
    if past.shape[1] < size:
        return scores
    runs = past.unfold(1, size, 1)  # [B, L - size + 1, size]
    tail = held[:, None] - size + 1 + torch.arange(size - 1, device=past.device)  # [B, size - 1]
    last = past.gather(1, tail.clamp(min=0))
    whole = torch.arange(size, past.shape[1] + 1, device=past.device) <= held[:, None]  # [B, L - size + 1]
    again = (runs[..., :-1] == last[:, None]).all(-1) & whole
    banned = torch.zeros_like(scores).scatter_reduce(1, runs[..., -1], again.to(scores.dtype), "amax")
    return scores.masked_fill(banned > 0, float("-inf"))


def highest(scores: Tensor) -> Tensor:
    """Where each row [B, V] is highest, the first place of several, as argmax has it; [B].

    Parts of a row are looked at side by side: a GPU reads a row alone with one of its many multiprocessors.
    """
    parts = gcd(scores.shape[1], PARTS)
    best, place = scores.unflatten(1, (parts, -1)).max(-1)  # [B, parts]
    part = best.argmax(-1, keepdim=True)  # [B, 1]
    return (part * (scores.shape[1] // parts) + place.gather(1, part))[:, 0]


def uniform(stream: Tensor, count: Tensor) -> Tensor:
    """One number in [0, 1) a row, float64, out of its stream [B] and how many it has drawn [B]."""
    bits = stream + (count + 1) * GOLDEN  # int64 arithmetic wraps around
    for shift, factor in ROUNDS:
        bits = (bits ^ _shifted(bits, shift)) * factor
    return _shifted(bits ^ _shifted(bits, 31), 64 - BITS).double() * 2.0**-BITS


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (bits >> by) & (2 ** (64 - by) - 1)


def draw(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Tokens [B]: where the running sum of each row's probabilities [B, V] passes its number [B] in [0, 1)."""
    sums = probabilities.double().cumsum(-1)
    return torch.searchsorted(sums, numbers[:, None] * sums[:, -1:], right=True)[:, 0].clamp(max=sums.shape[1] - 1)
