"""Text to token ids with the exact boundary between a prompt and its answer.

The two are tokenized as one text, once; character offsets say which tokens are whose. The tokenizer's backend is copied
without its post-processor, which would put special tokens around every text and may trim spaces off the offsets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
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


class TextTokenizer:
    """A fast tokenizer's text part. ModelError for a slow tokenizer, which knows no offsets."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        name = tokenizer.name_or_path or "the model"
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{name} has a slow tokenizer ({type(tokenizer).__name__}), which does not say where tokens lie in the "
                "text; a tokenizer.json is needed"
            )
        self.tokenizer = tokenizer
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.post_processor = None
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = tokenizer.split_special_tokens
        self.prefix, self.suffix = self._special_tokens(name)

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
        """(ids, token types or None) of texts, or pairs, with all special tokens, as classifiers read them."""
        types = "token_type_ids" in self.tokenizer.model_input_names
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
        """SHA-256 of everything that ids depend on."""
        digest = hashlib.sha256(self._backend.to_str().encode())
        digest.update(repr((self.prefix, self.suffix, self.eos_token_id)).encode())
        return digest.hexdigest()

    def _special_tokens(self, name: str) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before and after every text."""
        found = []
        for probe, text in zip(PROBES, self.ids(PROBES), strict=True):
            ids = self.tokenizer(probe, verbose=False)["input_ids"]
            starts = [at for at in range(len(ids) - len(text) + 1) if ids[at : at + len(text)] == text]
            if not starts:
                raise ModelError(
                    f"{name}: the tokenizer ({type(self.tokenizer).__name__}) changes texts outside its "
                    "tokenizer.json, so that the end of a prompt cannot be found exactly"
                )
            found.append((ids[: starts[0]], ids[starts[0] + len(text) :]))
        return found[0]


def _cut(ids: list[int], offsets: list[tuple[int, int]], *, end: int, alone: list[int]) -> Cut:
    boundary = next((index for index, (_, stop) in enumerate(offsets) if stop > end), len(ids))
    spans = boundary < len(ids) and offsets[boundary][0] < end
    return Cut(ids, boundary, spans, ids[:boundary] != alone)
