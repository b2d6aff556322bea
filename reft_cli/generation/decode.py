"""Answers to any number of prompts, by the fastest way that is exact: our own slots, or transformers' `generate`."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_cli.data.encode import Example
from reft_cli.errors import ModelError
from reft_cli.generation.prompts import rounded
from reft_cli.generation.settings import Answer, Decoding, Endings, Request, end_tokens
from reft_cli.generation.slots import Progressed, SlotDecoder
from reft_cli.generation.stream import Growing, cut_at
from reft_cli.generation.whole import generate, stream
from reft_cli.models.compiling import why_not_compiled
from reft_cli.models.intervened import IntervenedModel
from reft_cli.models.merging import Merge, find_merge
from reft_cli.models.placement import is_spread
from reft_cli.models.sharding import is_sharded
from reft_cli.models.slots import SlotTrial, try_slots, why_nothing_is_kept
from reft_cli.models.stacked import Member, Stack
from reft_cli.positions import PositionGroup

SLOTS, BATCH = {"cuda": 128}, 32  # prompts decoded together if nobody says how many
# Steps from which compiling wins back its time: on an H200 it takes 20 to 40 seconds the first time, less with torch's
# cache of compiled code, and saves a millisecond of each step of a model of 1B parameters.
WORTH_COMPILING = 30_000
# Operations from which on a GPU may try to read what prompts begin with once: compiling its kernels takes seconds.
WORTH_TRYING = 1e15
MEMORY_SHARE = 0.7  # of the device's free memory that the cache may take


class Decoder:
    """Decodes for a base model and a stack of checkpoints on it. What it builds serves its later calls."""

    def __init__(self, model: PreTrainedModel, stack: Stack, *, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.stack, self.tokenizer = model, stack, tokenizer
        self._sharded, self._spread = is_sharded(model), is_spread(model)
        self._tried: SlotTrial | None = None
        self._keeps: bool | None = None
        self._slots: SlotDecoder | None = None
        self._wanted = 0  # slots, if memory allowed
        self._merges: dict[int, Merge | None] = {}

    @classmethod
    def of(
        cls, model: IntervenedModel, groups: Sequence[PositionGroup], *, tokenizer: PreTrainedTokenizerBase
    ) -> Decoder:
        """For one checkpoint, member 1, as its weights are now."""
        stack = Stack(model.base_model, [Member.of(model, groups)])
        return cls(model.base_model, stack, tokenizer=tokenizer)

    def why_not_slots(self, decoding: Decoding) -> str | None:
        """None if these settings are decoded from slots, else why transformers' `generate` does it."""
        if decoding.beams > 1:
            return "beams need a search of their own"
        if not decoding.use_cache:
            return "use_cache is off"
        if self._sharded:
            return "its blocks are spread over processes"
        if self._spread:
            return "its blocks lie on several devices"
        if self._tried is None:
            self._tried = try_slots(self.model)
        return self._tried.reason

    def progress(
        self, requests: Sequence[Request], *, decoding: Decoding, batch_size: int | None
    ) -> Generator[Progressed, None, None]:
        """How answers grow, in whatever order they do; tokens may go on after the answer's end."""
        if not requests:
            return
        if self.why_not_slots(decoding) is None:
            merge = self._merge_for(requests)
            if merge is not None:  # then the base model is the member
                requests = [replace(request, member=0) for request in requests]
            slots = self._slot_decoder(requests, decoding, batch_size or SLOTS.get(self.model.device.type, BATCH))
            with merge.merged() if merge is not None else nullcontext():
                yield from slots.run(requests, merged=merge is not None)
            return
        yield from self._whole(requests, decoding=decoding, size=batch_size or BATCH)

    def _whole(
        self, requests: Sequence[Request], *, decoding: Decoding, size: int
    ) -> Generator[Progressed, None, None]:
        """By transformers' `generate`. Several answers without sampling are the best beams of one search."""
        searches: dict[tuple[tuple[int, ...], int, int], list[int]] = {}
        for index, each in enumerate(requests):
            draw = each.sample if decoding.temperature > 0 else 0
            searches.setdefault((tuple(each.prompt), each.member, draw), []).append(index)
        shared = list(searches.values())
        for start in range(0, len(shared), size):
            batch = shared[start : start + size]
            firsts = [requests[indices[0]] for indices in batch]
            ranks = [[0 if decoding.temperature > 0 else requests[index].sample for index in each] for each in batch]
            best = 1 + max(max(each) for each in ranks)
            found = generate(self.model, self.stack, firsts, tokenizer=self.tokenizer, decoding=decoding, best=best)
            for row, (indices, places) in enumerate(zip(batch, ranks, strict=True)):
                for index, place in zip(indices, places, strict=True):
                    yield Progressed(index, found[row * best + place], done=True)

    def answers(
        self, requests: Sequence[Request], *, decoding: Decoding, batch_size: int | None
    ) -> Iterator[tuple[int, Answer]]:
        """(number of the request, its answer) as they are done; long prompts begin, which keeps batches full."""
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt))
        endings = Endings.of(self.model, self.tokenizer, decoding)
        sorted_requests = [requests[index] for index in order]
        with closing(self.progress(sorted_requests, decoding=decoding, batch_size=batch_size)) as found:
            for each in found:
                if each.done:
                    yield order[each.index], endings.answer(each.tokens)

    def in_order(self, requests: Sequence[Request], *, decoding: Decoding, batch_size: int | None) -> Iterator[Answer]:
        """Answers in the order of the requests, each as soon as those before it are done."""
        endings = Endings.of(self.model, self.tokenizer, decoding)
        early: dict[int, Answer] = {}
        told = 0
        with closing(self.progress(requests, decoding=decoding, batch_size=batch_size)) as found:
            for each in found:
                if each.done:
                    early[each.index] = endings.answer(each.tokens)
                while told in early:
                    yield early.pop(told)
                    told += 1

    def _merge_for(self, requests: Sequence[Request]) -> Merge | None:
        """What puts the one member that all requests are for into the weights, if that is exact."""
        members = {request.member for request in requests}
        if len(members) != 1 or members == {0}:
            return None
        member = members.pop()
        if member not in self._merges:
            self._merges[member] = find_merge(self.model, self.stack.members[member - 1])
        return self._merges[member]

    def stream(self, request: Request, *, decoding: Decoding) -> Generator[str, None, None]:
        """Pieces of one answer as it is decoded, up to a stop text. Beams come as one piece."""
        if decoding.beams > 1:
            yield next(self.answers([request], decoding=decoding, batch_size=1))[1].text
        elif self.why_not_slots(decoding) is None:
            with closing(self._pieces(request, decoding)) as found:
                yield from cut_at(found, decoding.stop)
        else:
            whole = stream(self.model, self.stack, request, tokenizer=self.tokenizer, decoding=decoding)
            with closing(whole) as found:
                yield from cut_at(found, decoding.stop)

    def _pieces(self, request: Request, decoding: Decoding) -> Generator[str, None, None]:
        growing, told = Growing(self.tokenizer, ends=end_tokens(self.model, self.tokenizer)), 0
        with closing(self.progress([request], decoding=decoding, batch_size=1)) as found:
            for each in found:
                piece = growing.add(each.tokens[told:], final=each.done)
                told = len(each.tokens)
                if piece:
                    yield piece

    def _slot_decoder(self, requests: Sequence[Request], decoding: Decoding, batch_size: int) -> SlotDecoder:
        """One with room for the longest request, and no more slots than requests or memory."""
        assert self._tried is not None
        there = self._slots
        longest = max(len(request.prompt) for request in requests) + decoding.max_new_tokens
        room, slots = rounded(longest), min(batch_size, len(requests))
        compiles = self._compiles(decoding, steps=-(-len(requests) // slots) * decoding.max_new_tokens)
        fits = there is not None and there.decoding == decoding and there.cache.room >= longest
        if there is None or not fits or self._wanted != slots or (compiles and not there.compiles):
            self._slots, self._wanted = None, slots  # the old one's memory first
            self._slots = SlotDecoder(
                self.model,
                self.stack,
                decoding=decoding,
                endings=Endings.of(self.model, self.tokenizer, decoding),
                slots=min(slots, self._slots_in_memory(room)),
                room=room,
                compiles=compiles,
                keeps=self._may_keep,
            )
        assert self._slots is not None
        return self._slots

    def _may_keep(self, tokens: int) -> bool:
        """Whether prompts may go on from what was read once, which saves so many tokens; tried where that pays."""
        on_gpu, operations = self.model.device.type == "cuda", 2 * self.model.num_parameters() * tokens
        if self._keeps is None and not (on_gpu and operations < WORTH_TRYING):
            self._keeps = why_nothing_is_kept(self.model) is None
        return bool(self._keeps)

    def _compiles(self, decoding: Decoding, *, steps: int) -> bool:
        """Whether so many steps, the most that there will be, are compiled. ModelError: they are to be, and cannot."""
        if decoding.compile == "off":
            return False
        reason = why_not_compiled(self.model.device)
        if decoding.compile == "on":
            if reason is not None:
                raise ModelError(f"generation.compile: on is not possible: {reason}; write auto or off")
            return True
        long = reason is None and self.model.device.type == "cuda" and steps >= WORTH_COMPILING
        return long and all(weight.is_floating_point() for weight in self.model.parameters())

    def _slots_in_memory(self, room: int) -> int:
        """How many slots of so much room the device has memory for; at least one."""
        if self.model.device.type != "cuda":
            return 2**31
        assert self._tried is not None
        device = self.model.device
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
        return max(1, int(free * MEMORY_SHARE) // (self._tried.bytes_a_token * room))


def requests_of(prompts: Sequence[Example], *, member: int) -> list[Request]:
    """Every prompt once, for one member of the stack."""
    return [Request(prompt.input_ids, member) for prompt in prompts]
