"""A key-value cache of slots, each with a sequence of its own length, and the attention that reads and writes it.

Prompts are read packed, without padding, and leave their keys and values in the slots they are given; after that every
slot takes one token a pass. Nothing a decoding pass does depends on values of tensors, so it can be captured as a CUDA
graph. What prompts begin with alike can be read once and kept; they are then read without it. Registered with
transformers under one name; the model itself sees no cache. While a cache is attached, each attention module has its
layer of it as an attribute, where a compiler finds it as it finds weights: one program then serves all layers, with the
writes fused into what is around them.

Shapes: B slots, L tokens a slot has room for, N packed tokens, P of what was kept, H heads, K key-value heads, E head
size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from reft_cli.models.attention import FLASH_TYPES, NotPackable, attending, packed_attention, why_no_shared_head
from reft_cli.models.packing import CLOSE, HEAD, LONG, SHORT, packing_inputs

SLOTS = "reft_slots"
Pair = tuple[Tensor, Tensor]  # keys and values
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
        self.written: tuple[Tensor, Tensor] | None = None
        """Slots and columns [N] of the packed prompts that a pass reads; None: it is one of a token for each slot."""
        self.begun = 0
        """Tokens P that the packed prompts of a pass go on from; each attention module has theirs as `slot_begun`."""
        self.masks: dict[int | None, Tensor] = {}
        """What a slot's new token attends to, as 0 and -inf [B, 1, 1, span], for each window that was met so far."""
        self._layers: list[tuple[nn.Module, Pair]] = []
        self._kept: dict[int, list[Pair]] = {}  # of each layer, keys and values [1, K, P, E]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, attention modules have their layer of this cache as `slot_layer`. What is kept is forgotten after."""
        for module, layer in self._layers:
            module.slot_layer = layer  # type: ignore[assignment]  # an attribute like any other
        try:
            yield
        finally:
            self._kept.clear()
            for module, _ in self._layers:
                del module.slot_layer
                vars(module).pop("slot_begun", None)

    def keep(self, name: int, slot: int) -> None:
        """Keep what a slot holds, for prompts that begin with it."""
        held = int(self.lengths[slot])
        self._kept[name] = [
            (keys[slot, None, :held].transpose(1, 2).clone(), values[slot, None, :held].transpose(1, 2).clone())
            for _, (keys, values) in self._layers
        ]

    def begin_prefill(self, slots: Sequence[int], lengths: Sequence[int], *, kept: int | None = None) -> None:
        """The next pass reads packed prompts of these lengths into these slots, after what was kept by that name."""
        device = self.every.device
        counts, owners = torch.tensor(lengths), torch.tensor(slots)
        taken = owners.to(device)
        self.begun = 0 if kept is None else self._begin(taken, self._kept[kept])
        rows = owners.repeat_interleave(counts).to(device)  # [N]
        columns = torch.cat([torch.arange(self.begun, self.begun + length) for length in lengths]).to(device)  # [N]
        self.written = rows, columns
        self.lengths[taken] = (counts + self.begun).to(device)

    def _begin(self, slots: Tensor, kept: list[Pair]) -> int:
        """Lay what was kept into slots; returns its tokens."""
        tokens = kept[0][0].shape[2]
        for (module, layer), begun in zip(self._layers, kept, strict=True):
            module.slot_begun = begun  # type: ignore[assignment]  # an attribute like any other
            for whole, beginning in zip(layer, begun, strict=True):
                whole[slots, :tokens] = beginning.transpose(1, 2)
        return tokens

    def begin_step(self) -> None:
        """The next pass is of one token for each slot, which stands at its `lengths`."""
        self.written = None
        columns, last = self.columns[: self.span], self.lengths[:, None]
        for window, before in self.masks.items():
            seen = columns <= last  # [B, span]
            if window is not None:
                seen &= columns > last - window
            hidden = before.new_full((), float("-inf"))
            self.masks[window] = torch.where(seen, hidden.new_zeros(()), hidden)[:, None, None]

    @property
    def bytes_a_token(self) -> int:
        """Memory for one token of one slot, in all layers that have run."""
        pairs = [tensor for _, pair in self._layers for tensor in pair]
        return sum(tensor.element_size() * tensor.shape[2] * tensor.shape[3] for tensor in pairs)

    def make_layer(self, module: nn.Module, key: Tensor, value: Tensor, window: int | None) -> None:
        """Keys and values [B, L, K, E] of an attention module, shaped after its first ones. Zeros: a mask of -inf
        does not hide what happens to be NaN."""
        pair = tuple(each.new_zeros(self.slots, self.room, each.shape[1], each.shape[3]) for each in (key, value))
        self._layers.append((module, pair))  # type: ignore[arg-type]  # two of them
        module.slot_layer = pair  # type: ignore[assignment]
        self.masks.setdefault(window, key.new_zeros(()))


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
    """Packed attention over prompts, or one token over its slot: [1, N, H, E] or [B, 1, H, E]."""
    if slots is None:
        raise NotPackable("it does not hand its call's arguments to its attention")
    if not hasattr(module, "slot_layer"):
        slots.make_layer(module, key, value, sliding_window)
    keys, values = module.slot_layer  # type: ignore[misc]  # see `attached`
    if slots.written is not None:
        keys.index_put_(slots.written, key[0].transpose(0, 1))
        values.index_put_(slots.written, value[0].transpose(0, 1))
        options: dict[str, object] = {"scaling": scaling, "sliding_window": sliding_window, **rest}
        if slots.begun:
            options["known_head"] = module.slot_begun
        return packed_attention(module, query, key, value, attention_mask, **options)  # type: ignore[arg-type]
    where = slots.every, slots.lengths
    keys.index_put_(where, key[:, :, 0])
    values.index_put_(where, value[:, :, 0])
    keys, values = (each[:, : slots.span].transpose(1, 2) for each in (keys, values))  # [B, K, span, E]
    return _attend(query, keys, values, slots.masks[sliding_window], scaling), None


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """[B, 1, H, E]. On a GPU in half precision heads share keys within the kernel, which takes half the time on an
    H200; elsewhere those that share stand where queries do, so that nothing is repeated for them.
    """
    shared = query.is_cuda and query.dtype in FLASH_TYPES
    grouped = query if shared else query.unflatten(1, (keys.shape[1], -1)).squeeze(3)  # [B, K, H / K, E]
    attended = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling, enable_gqa=shared)
    return attended.reshape(query.shape[0], 1, query.shape[1], -1)


AttentionInterface.register(SLOTS, slot_attention)  # and no mask function: transformers then makes no mask


def prefill(
    model: PreTrainedModel,
    cache: SlotCache,
    prompts: Sequence[Sequence[int]],
    slots: Sequence[int],
    *,
    kept: int | None = None,
) -> Tensor:
    """Read prompts into slots; logits [prompts, V] of the token after each. Inside `attending(model, SLOTS)`.

    They are what comes after the tokens that the cache kept by that name.
    """
    lengths = [len(prompt) for prompt in prompts]
    cache.begin_prefill(slots, lengths, kept=kept)
    ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=model.device)  # [1, N]
    last = torch.tensor(lengths, device=model.device).cumsum(0) - 1
    assert cache.written is not None
    positions = cache.written[1][None]  # a token's position is its column
    return packed_logits(model, cache, ids, last, packing_inputs(lengths, model.device) | {"position_ids": positions})


def packed_logits(
    model: PreTrainedModel, cache: SlotCache, ids: Tensor, last: Tensor, inputs: dict[str, Tensor | int]
) -> Tensor:
    """Logits [prompts, V] after the tokens at `last` [prompts] of packed prompts [1, N]."""
    if "logits_to_keep" in signature(model.forward).parameters:
        logits: Tensor = model(input_ids=ids, use_cache=False, slots=cache, logits_to_keep=last, **inputs).logits[0]
        return logits
    return model(input_ids=ids, use_cache=False, slots=cache, **inputs).logits[0, last]  # type: ignore[no-any-return]


def step(model: PreTrainedModel, cache: SlotCache, tokens: Tensor) -> Tensor:
    """Put tokens [B] at the end of their slots; logits [B, V] of those after them. The caller counts `lengths` up."""
    cache.begin_step()
    output = model(input_ids=tokens[:, None], position_ids=cache.lengths[:, None], use_cache=False, slots=cache)
    return output.logits[:, -1]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class SlotTrial:
    """What came of trying slots with a model."""

    reason: str | None
    """None if decoding from slots equals the model's own forward pass, else why not."""
    bytes_a_token: int = 0


def try_slots(model: PreTrainedModel) -> SlotTrial:
    """Find out whether a model can decode from slots, on its device and in its type."""
    return _try(model, [])


def why_nothing_is_kept(model: PreTrainedModel) -> str | None:
    """None if prompts in slots may go on from tokens that were read once, else the reason; tried in the same way."""
    return why_no_shared_head(model) or _try(model, HEAD).reason


@torch.inference_mode()
def _try(model: PreTrainedModel, head: list[int]) -> SlotTrial:
    """Two prompts are read into slots, not in their order and beside an unused one, and each goes on for two tokens."""
    cache, kept = SlotCache(slots=3, room=32, device=model.device), 0 if head else None
    slots = [2, 0]
    try:
        with attending(model, SLOTS, kernels=bool(head)), cache.attached():
            if head:
                prefill(model, cache, [head], [0])
                cache.keep(0, slot=0)
            found = [prefill(model, cache, [LONG[:-2], SHORT[:-2]], slots, kept=kept)]
            for index in (-2, -1):
                tokens = torch.zeros_like(cache.every)
                tokens[slots] = torch.tensor([LONG[index], SHORT[index]], device=model.device)
                found.append(step(model, cache, tokens)[slots])
                cache.lengths[slots] += 1
    except NotPackable as reason:
        return SlotTrial(str(reason))
    except (TypeError, ValueError) as error:
        return SlotTrial(f"it cannot be switched to slots ({str(error).splitlines()[0]})")
    whole = [torch.tensor([head + each], device=model.device) for each in (LONG, SHORT)]
    alone = [model(each, use_cache=False).logits[0, -3:] for each in whole]
    wanted, given = torch.stack(alone, dim=1).float(), torch.stack(found).float()  # [3, 2, V]
    close = VERY_CLOSE if model.dtype == torch.float32 else CLOSE
    if not ((given - wanted).square().mean(-1).sqrt() <= close * wanted.std()).all():
        return SlotTrial("its logits change when it decodes from slots")
    return SlotTrial(None, cache.bytes_a_token)
