"""Answers through transformers' own `generate`: for beams, for decoding without a cache and for unusual models.

Edits of prompt tokens happen while the prompt is read and live on in the cache. The rows of a pass are worked out as it
starts, from how much the cache holds, so that left padding, beams and `use_cache=False` all edit the same tokens.

Shapes: B prompts, W tokens of the longest one, T tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_cli.generation.settings import Decoding, Request, end_tokens
from reft_cli.generation.stream import TextPieces
from reft_cli.models.placement import entry_device
from reft_cli.models.stacked import BASE, Live, Stack

if TYPE_CHECKING:
    from transformers import GenerationConfig


class PassEdits:
    """Knows the edited tokens of a left-padded batch of prompts, and gives each pass of `generate` its rows."""

    def __init__(self, stack: Stack, requests: Sequence[Request], *, width: int, device: torch.device) -> None:
        self.stack, self.width = stack, width
        lengths = [len(request.prompt) for request in requests]
        members = [request.member for request in requests]
        starts = [row * width + width - length for row, length in enumerate(lengths)]
        owners = torch.full((len(requests) * width,), BASE, device=device)
        live = stack.prompt_rows(lengths, members, starts)
        if live is not None and live.rows is not None:
            owners[live.rows] = live.owners
        self.owners = owners.view(-1, width)  # [B, W]
        self.new_owners = torch.tensor([[stack.owner_of_new_tokens(each)] for each in members], device=device)  # [B, 1]

    def before_pass(self, _: nn.Module, __: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the base model."""
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        self.stack.live = self.live(past, ids.shape[0], ids.shape[1])

    def live(self, past: int, sequences: int, length: int) -> Live | None:
        """What is edited of tokens `past` to `past + length` of `sequences` rows (B times the beams)."""
        new = max(0, past + length - max(past, self.width))
        seen = [self.owners[:, past : past + length], self.new_owners.expand(-1, new)]
        owners = torch.cat(seen, dim=1).repeat_interleave(sequences // len(self.owners), dim=0).flatten()
        rows = owners.nonzero().squeeze(-1)  # [N]
        return Live(rows, owners[rows]) if len(rows) else None


@contextmanager
def edits_while_generating(model: PreTrainedModel, stack: Stack, requests: Sequence[Request]) -> Iterator[None]:
    """Inside, every forward pass of the base model edits the tokens of these left-padded prompts."""
    width = max(len(request.prompt) for request in requests)
    edits = PassEdits(stack, requests, width=width, device=entry_device(model))
    handle = model.register_forward_pre_hook(edits.before_pass, with_kwargs=True)
    try:
        with stack.hooked():
            yield
    finally:
        handle.remove()


def config_of(decoding: Decoding, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """transformers' form of the settings; nothing is taken from the model's own defaults but where an answer ends."""
    from transformers import GenerationConfig

    sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=decoding.min_new_tokens or None,
        do_sample=decoding.temperature > 0,
        num_beams=decoding.beams,
        repetition_penalty=decoding.repetition_penalty,
        no_repeat_ngram_size=decoding.no_repeat_ngram_size,
        stop_strings=list(decoding.stop) or None,
        use_cache=decoding.use_cache,
        eos_token_id=sorted(end_tokens(model, tokenizer)) or None,
        pad_token_id=tokenizer.pad_token_id or 0,
        **(sampling if decoding.temperature > 0 else {}),
    )


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    stack: Stack,
    requests: Sequence[Request],
    *,
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    best: int = 1,
    streamer: TextPieces | None = None,
) -> list[list[int]]:
    """New tokens of one left-padded batch, of so many of the best beams of each request in turn; they may go on after
    their end.
    """
    width = max(len(request.prompt) for request in requests)
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(each.prompt)) + list(each.prompt) for each in requests])  # [B, W]
    mask = torch.tensor([[0] * (width - len(each.prompt)) + [1] * len(each.prompt) for each in requests])
    if decoding.temperature > 0:
        torch.manual_seed(decoding.seed)
    config = config_of(decoding, model, tokenizer)
    config.num_return_sequences = best
    with edits_while_generating(model, stack, requests):
        output: Tensor = model.generate(  # type: ignore[operator]  # nn.Module's __getattr__ hides the method
            input_ids=ids.to(entry_device(model)),
            attention_mask=mask.to(entry_device(model)),
            generation_config=config,
            tokenizer=tokenizer if decoding.stop else None,
            streamer=streamer,
        )
    return output[:, width:].tolist()  # type: ignore[no-any-return]


def stream(
    model: PreTrainedModel,
    stack: Stack,
    request: Request,
    *,
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
) -> Generator[str, None, None]:
    """Pieces of one answer as `generate` decodes it in a thread of its own, which ends when this is closed."""
    pieces = TextPieces(tokenizer, ends=end_tokens(model, tokenizer))
    failures: list[BaseException] = []

    def decode() -> None:
        try:
            generate(model, stack, [request], tokenizer=tokenizer, decoding=decoding, streamer=pieces)
        except BaseException as error:  # handed to the caller's thread
            failures.append(error)
            pieces.end()

    thread = Thread(target=decode, daemon=True)
    thread.start()
    try:
        yield from pieces
    finally:
        pieces.cancel()
        thread.join()
    if failures:
        raise failures[0]
