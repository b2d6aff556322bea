"""Answers piece by piece: new text out of new tokens, and where a stop text cuts it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from queue import SimpleQueue

from torch import Tensor
from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character decode to


class Growing:
    """Text that grows token by token, piece by piece.

    Joined, the pieces are the text of all tokens decoded at once. Only the tokens since the last but one piece are
    decoded anew, with those before them as context: a tokenizer that writes spaces in front of words drops the first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, ends: Collection[int]) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self._tokens: list[int] = []
        self._start = self._told = 0  # context begins; text is out up to

    def add(self, tokens: Iterable[int], *, final: bool = False) -> str:
        """The new text that more tokens make; nothing while a character is incomplete and it is not final."""
        self._tokens += [token for token in tokens if token not in self._ends]
        old = self._text(self._tokens[self._start : self._told])
        new = self._text(self._tokens[self._start :])
        if len(new) <= len(old) or (new.endswith(UNFINISHED) and not final):
            return ""
        self._start, self._told = self._told, len(self._tokens)
        return new[len(old) :]

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class Cancelled(Exception):
    """Ends a `generate` whose text nobody reads any more."""


class TextPieces:
    """What `generate` in one thread hands over as tokens, another thread iterates as text (a transformers streamer)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, ends: Collection[int]) -> None:
        self._growing = Growing(tokenizer, ends=ends)
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._prompt_is_through = self._cancelled = False

    def cancel(self) -> None:
        """Nobody reads on: the next token ends the decoding."""
        self._cancelled = True

    def put(self, value: Tensor) -> None:
        """The prompt first, then every new token. Cancelled: nobody reads on."""
        if self._cancelled:
            raise Cancelled
        if self._prompt_is_through:
            self._tell(value.flatten().tolist())
        self._prompt_is_through = True

    def end(self) -> None:
        """No more tokens come."""
        self._tell([], final=True)
        self._queue.put(None)

    def _tell(self, tokens: list[int], *, final: bool = False) -> None:
        piece = self._growing.add(tokens, final=final)
        if piece:
            self._queue.put(piece)

    def __iter__(self) -> Iterator[str]:
        while (piece := self._queue.get()) is not None:
            yield piece


def stop_at(text: str, stops: Sequence[str]) -> int | None:
    """Where a growing text is cut: at the stop text that is whole first, the longest of those; None without one."""
    ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
    if not ends:
        return None
    seen = text[: min(ends)]
    return min(at for stop in stops if (at := seen.find(stop)) >= 0)


def cut_at(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Pieces of a text up to the first stop text; what may be the beginning of one is held back."""
    held, rest = "", iter(pieces)
    for piece in rest:
        held += piece
        cut = stop_at(held, stops)
        if cut is not None:
            if cut:
                yield held[:cut]
            for _ in rest:  # let the decoder end
                pass
            return
        safe = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` may be the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
