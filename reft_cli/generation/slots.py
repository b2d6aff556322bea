"""Our own decoding: a batch of slots that is kept full from a queue of prompts, one captured step for all of them.

Prompts are read packed, with their edits, into free slots; then all slots take a step together: the bare model, and
the edits of those whose intervention covers new tokens. On a GPU a step is one CUDA graph; the host looks at the flags
of finished rows every few steps only, and puts the next prompts of the queue in their place.

transformers' continuous batching (its paged cache and scheduler) was read for this and left alone: it mixes chunks of
prompts with decoded tokens in one captured pass whose rows change every time, and which rows those are is known to
private classes only, so that edits could be exact in it only against its own scheduler; its shapes also cost a
variable-length attention call a layer where slots need none.

Shapes: B slots, L tokens a slot has room for, A longest answer, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_cli.generation.choose import Chooser
from reft_cli.generation.settings import Decoding, Endings, Request
from reft_cli.models.attention import attending
from reft_cli.models.blocks import find_blocks
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
COMPILER = {"coordinate_descent_tuning": True}


@dataclass(frozen=True)
class State:
    """What the device knows of each slot; a dead one keeps still."""

    token: Tensor  # [B] the last token, which the next step reads
    alive: Tensor  # [B] bool
    count: Tensor  # [B] tokens of the answer so far
    limit: Tensor  # [B] most tokens of the answer
    stream: Tensor  # [B] where the random numbers begin
    owner: Tensor  # [B] who edits new tokens
    held: Tensor  # [B] tokens of prompt and answer so far
    answer: Tensor  # [B, A + 1], the last column for what nobody reads
    past: Tensor  # [B, L + 1] prompt and answer, or [B, 0] if nobody reads them

    @classmethod
    def empty(cls, *, slots: int, answer: int, past: int, device: torch.device) -> State:
        """Dead slots."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(slots, *shape, dtype=torch.long, device=device)

        return cls(zeros(), zeros().bool(), zeros(), zeros(), zeros(), zeros(), zeros(), zeros(answer + 1), zeros(past))

    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the fields."""
        return [getattr(self, each.name) for each in fields(self)]

    def select(self, rows: Tensor) -> State:
        """A copy of some slots."""
        return State(*(tensor[rows] for tensor in self.tensors()))

    def put(self, rows: Tensor, other: State) -> None:
        """Overwrite some slots."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine[rows] = theirs

    def take(self, logits: Tensor, chooser: Chooser) -> None:
        """Choose the next token of every living slot from logits [B, V] and note it."""
        past = self.past if self.past.shape[1] else None
        tokens = chooser.choose(logits, past=past, held=self.held, count=self.count, stream=self.stream)
        _write(self.answer, self.count, tokens, self.alive)
        if past is not None:
            _write(self.past, self.held, tokens, self.alive)
        self.token.copy_(torch.where(self.alive, tokens, self.token))
        self.count.add_(self.alive)
        self.held.add_(self.alive)
        self.alive.logical_and_(~chooser.ended(tokens) & (self.count < self.limit))


def _write(table: Tensor, column: Tensor, values: Tensor, wanted: Tensor) -> None:
    """table[b, column[b]] = values[b] where it is wanted; elsewhere into the last column."""
    at = torch.where(wanted, column, table.shape[1] - 1)
    table.scatter_(1, at[:, None], values[:, None])


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
    """Decodes requests with the settings it was made for; its cache and captured steps serve many calls."""

    def __init__(
        self,
        model: PreTrainedModel,
        stack: Stack,
        *,
        decoding: Decoding,
        endings: Endings,
        slots: int,
        room: int,
        compiles: bool = False,
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
        self._captures, self.compiles = kind == "cuda", compiles
        self._compiled: tuple[CompiledParts, SideBySide] | None = None
        self.why_not_captured: str | None = None if self._captures else f"there are no CUDA graphs on {kind}"
        self._edits = self._merged = False
        self._places: list[int] = []
        self._graphs: dict[tuple[int, bool, bool], torch.cuda.CUDAGraph] = {}

    def run(self, requests: Sequence[Request], *, merged: bool = False) -> Generator[Progressed, None, None]:
        """How answers grow, look by look, and which are done. Closing it stops; until then nothing else may run the
        model, which attends from slots. `merged`: the weights are not the base's own, so its steps are others.
        """
        with ExitStack() as entered:
            entered.enter_context(attending(self.model, SLOTS))
            entered.enter_context(self.stack.hooked())
            entered.enter_context(self.cache.attached())
            if self.compiles and self._compiled is None:
                self._compiled = self._compile()
            self._forget_old_weights()
            self._merged = merged
            self._edits = any(self.stack.owner_of_new_tokens(request.member) for request in requests)
            yield from self._run(deque(enumerate(requests)))

    def _forget_old_weights(self) -> None:
        """Captured steps read weights where they lay; somebody may have laid them elsewhere since."""
        places = [each.weight.data_ptr() for each in self.model.modules() if isinstance(each, nn.Linear)]
        if places != self._places:
            self._places = places
            self._graphs.clear()

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

    def _admit(self, waiting: deque[tuple[int, Request]], free: list[int], busy: dict[int, Busy]) -> None:
        """Read the next prompts into free slots and choose their first tokens."""
        chosen: list[tuple[int, Request]] = []
        room = self.prefill_tokens
        while waiting and len(chosen) < len(free) and (not chosen or len(waiting[0][1].prompt) <= room):
            chosen.append(waiting.popleft())
            room -= len(chosen[-1][1].prompt)
        chosen.sort(key=lambda each: -len(each[1].prompt))
        slots = [free.pop() for _ in chosen]
        logits = self._prefill([request for _, request in chosen], slots)
        rows = torch.tensor(slots, device=self.model.device)
        fresh = self._fresh([request for _, request in chosen])
        fresh.take(logits, self.chooser)
        self.state.put(rows, fresh)
        for slot, (index, request) in zip(slots, chosen, strict=True):
            busy[slot] = Busy(index, held=len(request.prompt), left=self.decoding.max_new_tokens - 1)

    def _prefill(self, requests: Sequence[Request], slots: Sequence[int]) -> Tensor:
        lengths = [len(request.prompt) for request in requests]
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        self.stack.live = self.stack.prompt_rows(lengths, [request.member for request in requests], starts)
        with self._running():
            return prefill(self.model, self.cache, [request.prompt for request in requests], slots)

    def _fresh(self, requests: Sequence[Request]) -> State:
        """The state of slots that have just read their prompts."""
        past = self.state.past.shape[1]
        state = State.empty(
            slots=len(requests), answer=self.decoding.max_new_tokens, past=past, device=self.model.device
        )

        def put(tensor: Tensor, values: Sequence[int]) -> None:
            tensor.copy_(torch.tensor(values, device=tensor.device))

        state.alive.fill_(True)
        state.limit.fill_(self.decoding.max_new_tokens)
        put(state.held, [len(request.prompt) for request in requests])
        put(state.stream, [request.stream(self.decoding.seed) for request in requests])
        put(state.owner, [self.stack.owner_of_new_tokens(request.member) for request in requests])
        if past:
            for row, request in enumerate(requests):
                put(state.past[row, : len(request.prompt)], request.prompt)
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
            with self._running():
                self._advance()
        self.steps += 1
        for each in busy.values():
            each.held, each.left = each.held + 1, each.left - 1

    def _replay(self, key: tuple[int, bool, bool]) -> None:
        """A captured step. A model whose step cannot be captured is stepped plainly from then on."""
        if key not in self._graphs:
            stream = torch.cuda.current_stream()
            try:
                self._graphs[key] = self._capture()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # say, a value that its router reads on the host
                torch.cuda.set_stream(stream)  # a failed capture leaves its own behind
                self._captures, self.why_not_captured = False, str(error).splitlines()[0]
                with self._running():
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
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        with self._running():
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._advance()
            torch.cuda.current_stream().wait_stream(side)
            for tensor, before in zip((*self.state.tensors(), self.cache.lengths), kept, strict=True):
                tensor.copy_(before)
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._advance()
        return graph

    # ---- compiling

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Inside, what is to be compiled runs compiled."""
        if self._compiled is None:
            yield
            return
        parts, neighbours = self._compiled
        with neighbours.running(), parts.running(forgiving=self.decoding.compile == "auto"):
            yield

    def _compile(self) -> tuple[CompiledParts, SideBySide]:
        """Prepare to compile the edits, the blocks and what is around them, or the parts without hooks inside.

        The model runs once before, so that its attention has its slots: they are no matter for a compiler.
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
        parts = [part for block in blocks for part in compilable_parts(block, hooked)]
        options = COMPILER | {"post_grad_custom_pre_pass": same_once()}
        self.stack.fuse(options=options)
        return CompiledParts([*parts, *around], options=options), SideBySide(self.model, hooked=hooked)

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


def rounded(tokens: int) -> int:
    """Room for so many tokens: 64, 128 or 256, then multiples of 256."""
    return next((size for size in (64, 128) if tokens <= size), -(-tokens // 256) * 256)
