"""What lm-evaluation-harness calls: its model class over `Requests`. Importing this needs lm-eval, the extra `eval`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from reft_cli.evaluation.requests import MOST_NEW_TOKENS, Continuation, Requests


class ReftLM(TemplateLM):
    """A model with edits. Where a context ends is lm-eval's own `_encode_pair`, so that scores compare with others'."""

    def __init__(self, requests: Requests) -> None:
        super().__init__()
        self.requests = requests
        self.tokenizer = requests.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def max_length(self) -> int:
        """Tokens that the model takes at once."""
        return self.requests.max_length

    @property
    def max_gen_toks(self) -> int:
        """Longest text where a task does not say."""
        return MOST_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """For the names of cached requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Tokens of a text, after the tokenizer's first tokens unless told otherwise."""
        return self.requests.ids(string, special=add_special_tokens is not False)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See lm-eval."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        asked = [Continuation(context, answer, prompted=texts[0] != "") for texts, context, answer in requests]
        found = [(each.log_probability, each.greedy) for each in self.requests.likelihoods(asked)]
        for (texts, _context, _answer), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Σ log p of whole texts, in windows of what the model takes; there is no prompt in them."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = map(make_disjoint_window, windows)
            asked = [Continuation(before, text_ids, prompted=False) for before, text_ids in pairs]
            totals.append(sum(each.log_probability for each in self.requests.likelihoods(asked)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Text after each context, up to its stops."""
        contexts, settings = zip(*(request.args for request in requests), strict=True)
        texts = self.requests.generate(contexts, settings)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text
