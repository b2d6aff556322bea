"""A key-value cache of slots, each with a sequence of its own length, and the attention that reads and writes it.

Prompts are read packed, without padding, and leave their keys and values in the slots they are given; after that every
slot takes one token a pass. Nothing a decoding pass does depends on values of tensors, so it can be captured as a CUDA
graph. Registered with transformers under one name; the model itself sees no cache.

Shapes: B slots, L tokens a slot has room for, N packed tokens, H heads, K key-value heads, E head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from reft_cli.models.attention import NotPackable, attending, packed_attention
from reft_cli.models.packing import CLOSE, LONG, SHORT, packing_inputs

SLOTS = "reft_slots"
VERY_CLOSE = 5e-3  # of the logits' spread, in float32: above what tf32 rounds away


class SlotCache:
    """Keys and values of B slots; room in a layer is made when its attention first runs."""

    def __init__(self, *, slots: int, room: int, device: torch.device) -> None:
        self.slots, self.room = slots, room
        self.every = torch.arange(slots, device=device)  # [B]
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)  # [B] tokens that each slot holds
        self.columns = torch.arange(room, device=device)  # [L]
        self.span = room
        """Columns that a decoding pass looks at: no slot in use may hold more."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[int | None, Tensor] = {}
        self._written: tuple[Tensor, Tensor] | None = None

    def begin_prefill(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """The next pass reads packed prompts of these lengths into these slots."""
        device = self.every.device
        counts, owners = torch.tensor(lengths), torch.tensor(slots)
        rows = owners.repeat_interleave(counts).to(device)  # [N]
        columns = torch.cat([torch.arange(length) for length in lengths]).to(device)  # [N]
        self._written = rows, columns
        self.lengths[owners.to(device)] = counts.to(device)

    def begin_step(self) -> None:
        """The next pass is of one token for each slot, which stands at its `lengths`."""
        self._written = None
        self._masks.clear()

    @property
    def bytes_a_token(self) -> int:
        """Memory for one token of one slot, in all layers that have run."""
        pairs = [tensor for pair in self._layers.values() for tensor in pair]
        return sum(tensor.element_size() * tensor.shape[2] * tensor.shape[3] for tensor in pairs)

    def layer(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, L, K, E] of an attention module, shaped after its first ones. Zeros: a mask of -inf
        does not hide what happens to be NaN."""
        if id(module) not in self._layers:
            self._layers[id(module)] = tuple(  # type: ignore[assignment]  # two of them
                each.new_zeros(self.slots, self.room, each.shape[1], each.shape[3]) for each in (key, value)
            )
        return self._layers[id(module)]

    def write(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values of a pass, [1, K, N, E] of packed prompts or [B, K, 1, E]; returns the layer."""
        where = self._written or (self.every, self.lengths)
        kept = self.layer(module, key, value)
        for store, new in zip(kept, (key, value), strict=True):
            store.index_put_(where, new[0].transpose(0, 1) if self._written else new[:, :, 0])
        return kept

    @property
    def prefilling(self) -> bool:
        """Whether the pass is one of packed prompts."""
        return self._written is not None

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """What a slot's new token attends to, as 0 and -inf [B, 1, 1, span]; the same tensor for all layers alike."""
        if window not in self._masks:
            columns, last = self.columns[: self.span], self.lengths[:, None]
            seen = columns <= last  # [B, span]
            if window is not None:
                seen &= columns > last - window
            hidden = torch.full((), float("-inf"), dtype=dtype, device=seen.device)
            self._masks[window] = torch.where(seen, hidden.new_zeros(()), hidden)[:, None, None]
        return self._masks[window]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # which memory belongs to a module is for the host to know
def slot_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, N, E] or [B, H, 1, E]
    key: Tensor,  # [1, K, N, E] or [B, K, 1, E]
    value: Tensor,  # [1, K, N, E] or [B, K, 1, E]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    slots: SlotCache | None = None,
    **rest: object,  # transformers hands every attention function whatever the model was called with
) -> tuple[Tensor, None]:
    """Packed attention over prompts, or one token over its slot: [1, N, H, E] or [B, 1, H, E].

    The heads that share a key-value head stand where queries do, so that nothing is repeated for them.
    """
    if slots is None:
        raise NotPackable("it does not hand its call's arguments to its attention")
    keys, values = slots.write(module, key, value)
    if slots.prefilling:
        options: dict[str, object] = {"scaling": scaling, "sliding_window": sliding_window, **rest}
        return packed_attention(module, query, key, value, attention_mask, **options)  # type: ignore[arg-type]
    kv_heads = key.shape[1]
    attended = scaled_dot_product_attention(
        query.reshape(slots.slots, kv_heads, -1, query.shape[-1]),  # [B, K, H / K, E]
        keys[:, : slots.span].transpose(1, 2),  # [B, K, span, E]
        values[:, : slots.span].transpose(1, 2),
        attn_mask=slots.mask(sliding_window, query.dtype),
        scale=scaling,
    )
    return attended.reshape(slots.slots, 1, query.shape[1], -1), None


AttentionInterface.register(SLOTS, slot_attention)  # and no mask function: transformers then makes no mask


def prefill(model: PreTrainedModel, cache: SlotCache, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
    """Read prompts into slots; logits [prompts, V] of the token after each. Inside `attending(model, SLOTS)`."""
    lengths = [len(prompt) for prompt in prompts]
    cache.begin_prefill(slots, lengths)
    ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=model.device)  # [1, N]
    last = torch.tensor(lengths, device=model.device).cumsum(0) - 1
    inputs = packing_inputs(lengths, model.device)
    if "logits_to_keep" in signature(model.forward).parameters:
        logits: Tensor = model(input_ids=ids, use_cache=False, slots=cache, logits_to_keep=last, **inputs).logits[0]
        return logits
    return model(input_ids=ids, use_cache=False, slots=cache, **inputs).logits[0, last]  # type: ignore[no-any-return]


def step(model: PreTrainedModel, cache: SlotCache, tokens: Tensor) -> Tensor:
    """Put tokens [B] at the end of their slots; logits [B, V] of those after them. The caller counts `lengths` up."""
    cache.begin_step()
    output = model(input_ids=tokens[:, None], position_ids=cache.lengths[:, None], use_cache=False, slots=cache)
    return output.logits[:, -1]  # type: ignore[no-any-return]


@torch.inference_mode()
def try_slots(model: PreTrainedModel) -> tuple[str | None, int]:
    """(None if decoding from slots equals the model's own forward pass, else the reason; bytes of cache a token).

    Two prompts are read into slots, not in their order and beside an empty one, and each goes on for two tokens.
    """
    cache = SlotCache(slots=3, room=16, device=model.device)
    slots = [2, 0]
    try:
        with attending(model, SLOTS):
            found = [prefill(model, cache, [LONG[:-2], SHORT[:-2]], slots)]
            for index in (-2, -1):
                tokens = torch.zeros_like(cache.every)
                tokens[slots] = torch.tensor([LONG[index], SHORT[index]], device=model.device)
                found.append(step(model, cache, tokens)[slots])
                cache.lengths[slots] += 1
    except NotPackable as reason:
        return str(reason), 0
    except (TypeError, ValueError) as error:
        return f"it cannot be switched to slots ({str(error).splitlines()[0]})", 0
    alone = [model(torch.tensor([each], device=model.device), use_cache=False).logits[0, -3:] for each in (LONG, SHORT)]
    wanted, given = torch.stack(alone, dim=1).float(), torch.stack(found).float()  # [3, 2, V]
    close = VERY_CLOSE if model.dtype == torch.float32 else CLOSE
    if not ((given - wanted).square().mean(-1).sqrt() <= close * wanted.std()).all():
        return "its logits change when it decodes from slots", 0
    return None, cache.bytes_a_token
