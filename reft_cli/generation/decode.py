"""Answers from an intervened model, through transformers' own `generate`.

Edits of prompt tokens happen while the prompt is read and live on in the cache; decoding then runs the bare model.
Positions `all` and `generated` edit every new token too. The rows of a pass are worked out as it starts, from how much
the cache holds, so that left padding, beams, chunked prefill and `use_cache=False` all edit the same tokens.

Shapes: B prompts, W tokens of the longest one, T tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from reft_cli.data.encode import Example
from reft_cli.data.fitting import check_fits
from reft_cli.generation.stream import stop_at
from reft_cli.models.intervened import IntervenedModel
from reft_cli.positions import PositionGroup


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

    def to_config(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """transformers' form of it; nothing is taken from the model's own defaults but where an answer ends."""
        ends = getattr(model.generation_config, "eos_token_id", None)
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens or None,
            do_sample=self.temperature > 0,
            num_beams=self.beams,
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            stop_strings=list(self.stop) or None,
            use_cache=self.use_cache,
            eos_token_id=tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=tokenizer.pad_token_id or 0,
            **(sampling if self.temperature > 0 else {}),
        )


@dataclass(frozen=True)
class Answer:
    """A completion, without its end token and stop text."""

    text: str
    tokens: int
    finished: bool
    """The model ended it, rather than max_new_tokens."""


class PromptEdits:
    """Knows the edited tokens of a left-padded batch of prompts, and gives each pass of `generate` its rows."""

    def __init__(
        self, model: IntervenedModel, prompts: Sequence[Example], groups: Sequence[PositionGroup], width: int
    ) -> None:
        self.model = model
        self.width = width
        self.always = {group.name for group in groups if group.phase != "prompt"}
        self.masks: dict[str, Tensor] = {}
        for group in groups:
            mask = torch.zeros(len(prompts), width, dtype=torch.bool)  # [B, W]
            for row, prompt in enumerate(prompts):
                length = len(prompt.input_ids)
                mask[row, [width - length + token for token in group.indices(length, length)]] = True
            self.masks[group.name] = mask.to(model.device)

    def before_pass(self, _: nn.Module, __: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the base model."""
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        self.model.set_rows(self.rows(past, ids.shape[0], ids.shape[1]))

    def rows(self, past: int, sequences: int, length: int) -> dict[str, Tensor]:
        """Flat rows of a pass over tokens `past` to `past + length` of `sequences` rows (B times the beams)."""
        rows: dict[str, Tensor] = {}
        for name, mask in self.masks.items():
            if past >= self.width and name not in self.always:
                continue
            new = max(0, past + length - max(past, self.width))
            seen = mask[:, past : past + length].repeat_interleave(sequences // mask.shape[0], dim=0)
            grown = torch.full((sequences, new), name in self.always, dtype=torch.bool, device=mask.device)
            live = torch.cat([seen, grown], dim=1).flatten().nonzero().squeeze(-1)  # [N]
            if len(live):
                rows[name] = live
        return rows


@contextmanager
def edits_while_generating(
    model: IntervenedModel, prompts: Sequence[Example], groups: Sequence[PositionGroup], width: int
) -> Iterator[None]:
    """Inside, every forward pass of the base model edits the tokens of these prompts."""
    edits = PromptEdits(model, prompts, groups, width)
    handle = model.base_model.register_forward_pre_hook(edits.before_pass, with_kwargs=True)
    try:
        with model.editing(None):
            yield
    finally:
        handle.remove()


@torch.inference_mode()
def decode_batch(
    model: IntervenedModel,
    prompts: Sequence[Example],
    *,
    groups: Sequence[PositionGroup],
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    edited: bool = True,
    streamer: BaseStreamer | None = None,
) -> list[Answer]:
    """Answers to one batch of prompts, left-padded; with `edited=False` those of the base model.

    DataError: a prompt and its answer may be more than the model has positions for.
    """
    check_fits(prompts, model.base_model, name="prompt", new_tokens=decoding.max_new_tokens)
    width = max(len(prompt.input_ids) for prompt in prompts)
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(p.input_ids)) + p.input_ids for p in prompts])  # [B, W]
    mask = torch.tensor([[0] * (width - len(p.input_ids)) + [1] * len(p.input_ids) for p in prompts])  # [B, W]
    if decoding.temperature > 0:
        torch.manual_seed(decoding.seed)
    with edits_while_generating(model, prompts, groups if edited else (), width):
        output = model.base_model.generate(  # type: ignore[operator]  # nn.Module's __getattr__ hides the method
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=decoding.to_config(model.base_model, tokenizer),
            tokenizer=tokenizer if decoding.stop else None,
            streamer=streamer,
        )
    ends = end_tokens(model.base_model, tokenizer)
    return [_answer(tokens, ends, tokenizer, decoding) for tokens in output[:, width:].tolist()]


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: those of the model's own settings, and the tokenizer's end of sequence."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


def _answer(tokens: list[int], ends: set[int], tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> Answer:
    stop = next((index for index, token in enumerate(tokens) if token in ends), None)
    kept = tokens if stop is None else tokens[:stop]
    text: str = tokenizer.decode(kept, skip_special_tokens=True)
    cut = stop_at(text, decoding.stop)
    return Answer(text=text[:cut], tokens=len(kept), finished=stop is not None or cut is not None)


def decode_all(
    model: IntervenedModel,
    prompts: Sequence[Example],
    *,
    groups: Sequence[PositionGroup],
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    batch_size: int,
    edited: bool = True,
    on_progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answers to any number of prompts, in their order; batches are made of prompts of like length."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].input_ids))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [prompts[index] for index in chosen]
        done = decode_batch(model, batch, groups=groups, tokenizer=tokenizer, decoding=decoding, edited=edited)
        answers.update(zip(chosen, done, strict=True))
        if on_progress:
            on_progress(len(answers))
    return [answers[index] for index in range(len(prompts))]
