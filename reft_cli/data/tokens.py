"""Text to token ids with the exact boundary between a prompt and its answer.

The two are tokenized as one text, once; character offsets say which tokens are whose. The tokenizer's backend is copied
without its post-processor, which would put special tokens around every text and may trim spaces off the offsets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from reft_cli.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = ("The quick brown fox.", " 7 plus 5\nis 12 ")


@dataclass(frozen=True, slots=True)
class Cut:
    """Token ids of prompt + answer, of which the first `boundary` are the prompt's.

    `spans`: the first token of the answer begins in the prompt. `differs`: a prompt alone has other ids, and those are
    what the model is given at inference.
    """

    ids: list[int]
    boundary: int
    spans: bool
    differs: bool


def text_tokenizer(tokenizer: PreTrainedTokenizerBase) -> TextTokenizer:
    """The text part of a tokenizer; built once, as copying a vocabulary of 150,000 takes half a second."""
    return _built(tokenizer, len(tokenizer), tokenizer.eos_token_id)


@lru_cache(maxsize=2)
def _built(tokenizer: PreTrainedTokenizerBase, size: int, eos_token_id: int | None) -> TextTokenizer:
    return TextTokenizer(tokenizer)


class TextTokenizer:
    """A fast tokenizer's text part. ModelError for a slow tokenizer, which knows no offsets."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name = f"the tokenizer of {tokenizer.name_or_path}" if tokenizer.name_or_path else "the tokenizer"
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{self.name} is a slow one ({type(tokenizer).__name__}) and does not say where tokens lie in a text; "
                "a tokenizer.json is needed"
            )
        self.tokenizer = tokenizer
        self.eos_token_id: int | None = tokenizer.eos_token_id
        content = tokenizer.backend_tokenizer.to_str()
        self._content = hashlib.sha256(content.encode()).hexdigest()
        self._backend = Tokenizer.from_str(content)
        self._backend.post_processor = None
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = tokenizer.split_special_tokens
        self.prefix, self.suffix = self._special_tokens()

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts without special tokens around them."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def cut(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Cut]:
        """Ids of each prompt + answer; a token that ends in the answer is the answer's."""
        whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        encodings = self._backend.encode_batch(whole, add_special_tokens=False)
        return [
            _cut(encoding.ids, encoding.offsets, end=len(prompt), alone=alone)
            for encoding, prompt, alone in zip(encodings, prompts, self.ids(prompts), strict=True)
        ]

    def whole(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> tuple[list[list[int]], list[list[int]] | None]:
        """(ids, token types or None) of texts, or pairs, with all special tokens, as classifiers read them.

        A tokenizer that puts no special token between the two texts of a pair gets them on two lines of one text.
        """
        types = "token_type_ids" in self.tokenizer.model_input_names
        if pairs is not None and not self._separates_pairs():
            texts, pairs = [f"{text}\n{pair}" for text, pair in zip(texts, pairs, strict=True)], None
        encoded = self.tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            return_attention_mask=False,
            return_token_type_ids=types,
            verbose=False,
        )
        return encoded["input_ids"], encoded["token_type_ids"] if types else None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that ids depend on, the special tokens of pairs included."""
        kind, given = type(self.tokenizer).__name__, self.tokenizer
        settings = (kind, given.split_special_tokens, given.model_input_names, self.prefix, self.suffix)
        return hashlib.sha256(repr((self._content, settings, self.eos_token_id)).encode()).hexdigest()

    def _separates_pairs(self) -> bool:
        joined = self.tokenizer(PROBES[0], PROBES[1], verbose=False)["input_ids"]
        return len(joined) > sum(map(len, (self.prefix, *self.ids(PROBES), self.suffix)))

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before and after every text."""
        found = []
        for probe, text in zip(PROBES, self.ids(PROBES), strict=True):
            ids = self.tokenizer(probe, verbose=False)["input_ids"]
            starts = [at for at in range(len(ids) - len(text) + 1) if ids[at : at + len(text)] == text]
            if not starts:
                raise ModelError(
                    f"{self.name} ({type(self.tokenizer).__name__}) changes texts outside its tokenizer.json, "
                    "so that the end of a prompt cannot be found exactly"
                )
            found.append((ids[: starts[0]], ids[starts[0] + len(text) :]))
        return found[0]


def _cut(ids: list[int], offsets: list[tuple[int, int]], *, end: int, alone: list[int]) -> Cut:
    boundary = next((index for index, (_, stop) in enumerate(offsets) if stop > end), len(ids))
    spans = boundary < len(ids) and offsets[boundary][0] < end
    return Cut(ids, boundary, spans, ids[:boundary] != alone)
