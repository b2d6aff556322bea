"""Our own decoding: a batch of slots that is kept full from a queue of prompts, one captured step for all of them.

Prompts are read packed, with their edits, into free slots; what all of them begin with, a template's head or solved
rows, is read once. Then all slots take a step together: the bare model, and the edits of those whose intervention
covers new tokens. On a GPU a step is one CUDA graph; the host looks at the flags of finished rows every few steps only,
and puts the next prompts of the queue in their place.

transformers' continuous batching (its paged cache and scheduler) was read for this and left alone: it mixes chunks of
prompts with decoded tokens in one captured pass whose rows change every time, and which rows those are is known to
private classes only, so that edits could be exact in it only against its own scheduler; its shapes also cost a
variable-length attention call a layer where slots need none.

Shapes: B slots, L tokens a slot has room for, A longest answer, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_cli.data.examples import Example, Examples
from reft_cli.data.heads import common_head
from reft_cli.generation.choose import Chooser
from reft_cli.generation.prompts import PromptGraphs
from reft_cli.generation.settings import Decoding, Endings, Request
from reft_cli.generation.state import State
from reft_cli.models.attention import FLASH_TYPES, attending
from reft_cli.models.blocks import find_blocks
from reft_cli.models.capturing import NotCaptured, capture, run_aside
from reft_cli.models.compiling import CompiledParts, compilable_parts
from reft_cli.models.side_by_side import SideBySide, same_once
from reft_cli.models.slots import SLOTS, SlotCache, prefill, step
from reft_cli.models.stacked import Live, Stack

SPANS = {"cuda": 256, "cpu": 32}  # the cache is looked at in multiples of so many columns; a captured step for each
LOOKS = {"cuda": 4, "cpu": 1}  # steps between two looks at what is finished
PREFILL = {"cuda": 16_384, "cpu": 2_048}  # tokens of prompts read in one pass
REFILL = 8  # prompts are read when one slot in so many is free
# A product with one row is then a reduction in a kernel of its own, fused with what is around it, and reads its weights
# at close to the memory's bandwidth.
ONE_ROW = {"coordinate_descent_tuning": True}
PROMPTS, STEPS = 0, 1  # what is compiled
Compiled = tuple[CompiledParts, SideBySide]


@dataclass
class Busy:
    """What the host knows of a slot in use."""

    index: int  # of the request
    held: int  # at least as many tokens as the slot holds
    left: int  # at least as many as it may still generate
    tokens: list[int] = field(default_factory=list)  # of its answer, up to the last look


@dataclass(frozen=True)
class Progressed:
    """The tokens of an answer so far; more follow unless it is done."""

    index: int
    tokens: list[int]
    done: bool


class SlotDecoder:
    """Decodes requests with the settings it was made for; its cache and captured steps serve many calls.

    `keeps` says whether what prompts begin with may be read once, where that saves so many tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stack: Stack,
        *,
        decoding: Decoding,
        endings: Endings,
        slots: int,
        room: int,
        compiles: bool,
        keeps: Callable[[int], bool],
    ) -> None:
        self.model, self.stack, self.decoding, self.endings = model, stack, decoding, endings
        kind = model.device.type
        self.span_unit, self.look_every = SPANS.get(kind, SPANS["cpu"]), LOOKS.get(kind, LOOKS["cpu"])
        self.prefill_tokens = PREFILL.get(kind, PREFILL["cpu"])
        self.chooser = Chooser(decoding, ends=endings.tokens, device=model.device)
        with torch.inference_mode():
            self.cache = SlotCache(slots=slots, room=room, device=model.device)
            past = room + 1 if self.chooser.reads_the_past else 0
            self.state = State.empty(slots=slots, answer=decoding.max_new_tokens, past=past, device=model.device)
        self.steps = 0
        """Steps taken so far, for tests and reports."""
        self._captures, self.compiles, self.keeps = kind == "cuda", compiles, keeps
        self._compiled: tuple[Compiled | None, Compiled] | None = None
        self.why_not_captured: str | None = None if self._captures else f"there are no CUDA graphs on {kind}"
        self._edits = self._merged = False
        self._heads: dict[int, int] = {}  # tokens that all prompts for a member begin with
        self._places: list[int] = []
        self._prompts: PromptGraphs | None = None
        self._graphs: dict[tuple[int, bool, bool], torch.cuda.CUDAGraph] = {}

    def run(self, requests: Sequence[Request], *, merged: bool = False) -> Generator[Progressed, None, None]:
        """How answers grow, look by look, and which are done. Closing it stops; until then nothing else may run the
        model, which attends from slots. `merged`: the weights are not the base's own, so its steps are others.
        """
        self._heads = self._heads_worth_keeping(requests)
        with ExitStack() as entered:
            entered.enter_context(attending(self.model, SLOTS, kernels=bool(self._heads)))
            entered.enter_context(self.stack.hooked())
            entered.enter_context(self.cache.attached())
            self._merged = merged
            self._edits = any(self.stack.owner_of_new_tokens(request.member) for request in requests)
            if self.compiles and self._compiled is None:
                self._compiled = self._compile()
            self._forget_old_weights()
            self._read_heads(requests)
            yield from self._run(deque(enumerate(requests)))

    def _forget_old_weights(self) -> None:
        """Captured steps read weights where they lay; somebody may have laid them elsewhere since."""
        places = [each.weight.data_ptr() for each in self.model.modules() if isinstance(each, nn.Linear)]
        if places != self._places:
            self._places = places
            self._graphs.clear()
            self._prompts = self._new_prompts()

    def _new_prompts(self) -> PromptGraphs | None:
        """On a GPU in half precision: elsewhere packed attention reads lengths on the host."""
        if not self._captures or self.model.dtype not in FLASH_TYPES:
            return None
        return PromptGraphs(
            self.model, self.cache, self.stack, self.state, self.chooser, limit=self.decoding.max_new_tokens
        )

    def _run(self, waiting: deque[tuple[int, Request]]) -> Iterator[Progressed]:
        busy: dict[int, Busy] = {}
        free = list(range(self.cache.slots))
        while waiting or busy:
            with torch.inference_mode():  # left again before the reader goes on
                if not busy:
                    self.state.alive.zero_()
                if waiting and (not busy or len(free) * REFILL >= self.cache.slots):
                    while waiting and free:
                        self._admit(waiting, free, busy)
                else:
                    steps = min(self.look_every, max(each.left for each in busy.values()))
                    for _ in range(steps):
                        self._step(busy)
                news = list(self._look(busy, free))
            yield from news

    # ---- prompts

    def _heads_worth_keeping(self, requests: Sequence[Request]) -> dict[int, int]:
        """For each member tokens that all its prompts begin with, edited alike; those of none if not to be kept."""
        heads: dict[int, int] = {}
        saved = 0
        for member in {request.member for request in requests}:
            mine = [request.prompt for request in requests if request.member == member]
            prompts = Examples.of(Example(list(each), len(each), None, "", "", 0) for each in mine)
            head = common_head(prompts, groups=self.stack.groups_of(member))
            if head:
                heads[member] = head
                saved += head * (len(mine) - 1)
        return heads if heads and self.keeps(saved) else {}

    @torch.inference_mode()
    def _read_heads(self, requests: Sequence[Request]) -> None:
        for member, head in self._heads.items():
            first = next(request for request in requests if request.member == member)
            self._prefill([first], [0], part=range(head))
            self.cache.keep(member, slot=0)

    def _admit(self, waiting: deque[tuple[int, Request]], free: list[int], busy: dict[int, Busy]) -> None:
        """Read the next prompts into free slots and choose their first tokens."""
        chosen: list[tuple[int, Request]] = []
        room = self.prefill_tokens
        while waiting and len(chosen) < len(free) and (not chosen or self._unread(waiting[0][1]) <= room):
            chosen.append(waiting.popleft())
            room -= self._unread(chosen[-1][1])
        chosen.sort(key=lambda each: (self._head_of(each[1]), -len(each[1].prompt)))
        for _, together in groupby(chosen, key=lambda each: self._head_of(each[1])):
            self._begin(list(together), free, busy)

    def _head_of(self, request: Request) -> int:
        """The member whose head it begins with, or a number that is none."""
        return request.member if request.member in self._heads else -1

    def _unread(self, request: Request) -> int:
        return len(request.prompt) - self._heads.get(request.member, 0)

    def _begin(self, chosen: list[tuple[int, Request]], free: list[int], busy: dict[int, Busy]) -> None:
        """Read prompts that go on from the same head, or from none, in one pass."""
        slots, asked = [free.pop() for _ in chosen], [request for _, request in chosen]
        if not (len(asked) == 1 and self._read_captured(asked[0], slots[0])):
            head = self._heads.get(asked[0].member, 0)
            logits = self._prefill(
                asked, slots, part=range(head, self.cache.room), kept=asked[0].member if head else None
            )
            fresh = self._fresh(asked)
            fresh.take(logits, self.chooser)
            self.state.put(torch.tensor(slots, device=self.model.device), fresh)
        for slot, (index, request) in zip(slots, chosen, strict=True):
            busy[slot] = Busy(index, held=len(request.prompt), left=self.decoding.max_new_tokens - 1)

    def _prefill(
        self, requests: Sequence[Request], slots: Sequence[int], *, part: range, kept: int | None = None
    ) -> Tensor:
        """Read these tokens of prompts, after those that were kept; logits [requests, V] after the last of them."""
        lengths, members = [len(request.prompt) for request in requests], [request.member for request in requests]
        pieces = [request.prompt[part.start : part.stop] for request in requests]
        starts = [sum(map(len, pieces[:index])) - part.start for index in range(len(pieces))]
        self.stack.live = self.stack.prompt_rows(lengths, members, starts, part=part)
        with self._running(PROMPTS):
            return prefill(self.model, self.cache, pieces, slots, kept=kept)

    def _read_captured(self, request: Request, slot: int) -> bool:
        """Whether one prompt was read, and its first token chosen, by a captured pass."""
        if self._prompts is None:
            return False
        edited = self.stack.edited_rows([len(request.prompt)], [request.member], [0])
        with self._running(PROMPTS):
            return self._prompts.read(
                request.prompt,
                slot=slot,
                edited=edited,
                stream=request.stream(self.decoding.seed),
                owner=self.stack.owner_of_new_tokens(request.member),
                merged=self._merged,
            )

    def _fresh(self, requests: Sequence[Request]) -> State:
        """The state of slots that have just read their prompts."""
        past = self.state.past.shape[1]
        state = State.empty(
            slots=len(requests), answer=self.decoding.max_new_tokens, past=past, device=self.model.device
        )

        def of(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, device=self.model.device)

        state.begin(
            held=of([len(request.prompt) for request in requests]),
            stream=of([request.stream(self.decoding.seed) for request in requests]),
            owner=of([self.stack.owner_of_new_tokens(request.member) for request in requests]),
            limit=self.decoding.max_new_tokens,
        )
        if past:
            for row, request in enumerate(requests):
                state.past[row, : len(request.prompt)] = of(request.prompt)
        return state

    # ---- steps

    def _step(self, busy: dict[int, Busy]) -> None:
        """One token for every slot."""
        longest = max(each.held for each in busy.values()) + 1
        self.cache.span = min(self.cache.room, -(-longest // self.span_unit) * self.span_unit)
        self.stack.live = Live(None, self.state.owner) if self._edits else None
        if self._captures:
            self._replay((self.cache.span, self._edits, self._merged))
        else:
            with self._running(STEPS):
                self._advance()
        self.steps += 1
        for each in busy.values():
            each.held, each.left = each.held + 1, each.left - 1

    def _replay(self, key: tuple[int, bool, bool]) -> None:
        """A captured step. A model whose step cannot be captured is stepped plainly from then on."""
        if key not in self._graphs:
            try:
                self._graphs[key] = self._capture()
            except NotCaptured as reason:
                self._captures, self.why_not_captured = False, str(reason)
                with self._running(STEPS):
                    self._advance()
                return
        self._graphs[key].replay()

    def _advance(self) -> None:
        """What is captured: nothing in it depends on the values of tensors."""
        alive = self.state.alive.clone()
        logits = step(self.model, self.cache, self.state.token)
        self.cache.lengths.add_(alive)
        self.state.take(logits, self.chooser)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """A CUDA graph of a step. The step is run before, as libraries want it, and what it changed is put back.

        What it wrote into the cache may stay: the same token is written there again.
        """
        kept = [tensor.clone() for tensor in (*self.state.tensors(), self.cache.lengths)]
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        with self._running(STEPS):
            run_aside(self._advance)
            for tensor, before in zip((*self.state.tensors(), self.cache.lengths), kept, strict=True):
                tensor.copy_(before)
            return capture(self._advance, pool=pool)

    # ---- compiling

    @contextmanager
    def _running(self, what: int) -> Iterator[None]:
        """Inside, what is to be compiled of prompts or of steps runs compiled."""
        compiled = None if self._compiled is None else self._compiled[what]
        if compiled is None:
            yield
            return
        parts, neighbours = compiled
        with neighbours.running(), parts.running(forgiving=self.decoding.compile == "auto"):
            yield

    def _compile(self) -> tuple[Compiled | None, Compiled]:
        """Prepare to compile the edits, the blocks and what is around them, or the parts without hooks inside.

        The model runs once before, so that its attention has its slots: they are no matter for a compiler. Of a single
        slot the steps alone are compiled, and one-row products are tuned.
        """
        with torch.inference_mode():
            prefill(self.model, self.cache, [[0]], [0])
        hooked = [each for each in self.model.modules() if each._forward_hooks or each._forward_pre_hooks]
        blocks = list(find_blocks(self.model).modules)
        inside = {each for block in blocks for each in block.modules()}
        around = [
            each
            for each in self.model.modules()
            if not (each in inside or each in hooked or list(each.children()) or isinstance(each, nn.Embedding))
        ]
        parts = [*(part for block in blocks for part in compilable_parts(block, hooked)), *around]
        once, alone = {"post_grad_custom_pre_pass": same_once()}, self.cache.slots == 1
        neighbours = SideBySide(self.model, hooked=hooked, one_row=alone)
        if self._edits or not alone:
            self.stack.fuse(options=once)
        if alone:
            return None, (CompiledParts(parts, options=once | ONE_ROW), neighbours)
        return ((CompiledParts(parts, options=once), neighbours),) * 2

    # ---- answers

    def _look(self, busy: dict[int, Busy], free: list[int]) -> Iterator[Progressed]:
        """Wait for the device and see what is new and what is done; slots whose answers are become free."""
        for slot, (alive, count, *newest) in enumerate(self._newest().tolist()):
            seen = busy.get(slot)
            if seen is None:
                continue
            new = newest[len(newest) - (count - len(seen.tokens)) :]
            seen.tokens += new
            stopped = bool(new) and self.endings.stopped(seen.tokens, new=len(new))
            if stopped:
                self.state.alive[slot] = False
            if stopped or not alive:
                free.append(slot)
                del busy[slot]
            yield Progressed(seen.index, seen.tokens, done=slot not in busy)

    def _newest(self) -> Tensor:
        """Of each slot: whether it lives, how many tokens its answer has, and the last ones that a look may find."""
        count = self.state.count[:, None]
        columns = count - self.look_every + torch.arange(self.look_every, device=count.device)
        return torch.cat([self.state.alive[:, None].long(), count, self.state.answer.gather(1, columns.clamp(0))], 1)
