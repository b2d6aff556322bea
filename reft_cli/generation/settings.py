"""What generation is told and what it gives back: flat settings, requests and answers."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from reft_cli.generation.stream import stop_at


@dataclass(frozen=True)
class Decoding:
    """Flat settings of generation; the spec's section `generation` says what each means."""

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    beams: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    stop: tuple[str, ...] = field(default=())
    seed: int = 0
    use_cache: bool = True
    compile: Literal["auto", "on", "off"] = "auto"


@dataclass(frozen=True)
class Request:
    """A prompt, and which of a stack's members answers it: they count from 1, and 0 is the base model."""

    prompt: Sequence[int]
    member: int = 1
    sample: int = 0
    """Which of several answers to the same prompt this is."""

    def stream(self, seed: int) -> int:
        """Where its random numbers begin: the same for the same prompt and seed, in whatever batch it is answered."""
        text = array("q", (seed % 2**63, self.sample, *self.prompt)).tobytes()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


@dataclass(frozen=True)
class Answer:
    """A completion, without its end token and stop text."""

    text: str
    tokens: int
    finished: bool
    """The model ended it, rather than max_new_tokens."""


@dataclass(frozen=True)
class Endings:
    """Where answers end: at one of these tokens, or where one of these texts is complete."""

    tokens: frozenset[int]
    texts: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> Endings:
        """Those of a model, its tokenizer and the settings."""
        return cls(frozenset(end_tokens(model, tokenizer)), decoding.stop, tokenizer)

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special ones left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def stopped(self, tokens: Sequence[int], *, new: int) -> bool:
        """Whether one of the texts was completed by the last `new` of these tokens."""
        if not self.texts or not new:
            return False
        reach = new + 4 * max(map(len, self.texts))  # a character is at most four tokens
        tail = self.decode(tokens[-reach:])
        return any(text in tail for text in self.texts) and stop_at(self.decode(tokens), self.texts) is not None

    def answer(self, tokens: Sequence[int]) -> Answer:
        """The answer in new tokens that may go on after its end."""
        stop = next((index for index, token in enumerate(tokens) if token in self.tokens), None)
        kept = tokens if stop is None else tokens[:stop]
        text = self.decode(kept)
        cut = stop_at(text, self.texts)
        if cut is not None:
            kept = kept[: self._until_stop(kept)]
        return Answer(text=text[:cut], tokens=len(kept), finished=stop is not None or cut is not None)

    def _until_stop(self, tokens: Sequence[int]) -> int:
        """How many tokens it took to complete a stop text."""
        low, high = 1, len(tokens)
        while low < high:
            middle = (low + high) // 2
            if stop_at(self.decode(tokens[:middle]), self.texts) is None:
                low = middle + 1
            else:
                high = middle
        return low


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: those of the model's own settings, and the tokenizer's end of sequence."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}
