"""Answers to many prompts, kept one by one as they come, so that a killed evaluation goes on where it stood."""

from __future__ import annotations

import glob
import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from reft_cli.generation.decode import Decoder
from reft_cli.generation.settings import Answer, Decoding, Request
from reft_cli.parallel.collective import by_first, from_first, is_first, rank, size, spread


class AnswerStore:
    """A file with a JSON line for each answer, under a key of what decides it: the settings, the model, the prompt.

    Lines of other settings, of other prompts, and one that a kill tore are passed over; new ones go to the end. Each
    of several processes adds to a file of its own beside the first one's, and all know what is in any of them.
    """

    def __init__(self, path: Path, *, settings: str) -> None:
        self._first = path
        self.path = path if is_first() else path.with_name(f"{path.stem}-{rank()}{path.suffix}")
        self.settings, self.known = from_first(lambda: (settings, dict(self._read())))
        self._file: TextIO | None = None

    def _files(self) -> list[Path]:
        """Those that any process has written, now or before."""
        others = self._first.parent.glob(f"{glob.escape(self._first.stem)}-*{self._first.suffix}")
        return [path for path in (self._first, *sorted(others)) if path.exists()]

    def _read(self) -> Iterator[tuple[str, Answer]]:
        for path in self._files():
            text = path.read_text(encoding="utf-8", errors="replace")
            whole = text[: text.rfind("\n") + 1]
            for line in whole.split("\n")[:-1]:  # str.splitlines breaks at U+2028 and U+0085 inside answers too
                values = json.loads(line)
                yield values.pop("key"), Answer(**values)
            if whole != text:
                path.write_text(whole, encoding="utf-8")

    def key(self, request: Request) -> str:
        """The same for requests that have the same answer."""
        numbers = array("q", (request.member, request.sample, *request.prompt)).tobytes()
        return hashlib.sha256(self.settings.encode() + numbers).hexdigest()[:24]

    def know(self, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        """Hold answers that this or another process keeps."""
        self.known.update(zip(map(self.key, requests), answers, strict=True))

    def add(self, request: Request, answer: Answer) -> None:
        """Keep an answer; it is with the operating system when this returns."""
        self.know([request], [answer])
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps({"key": self.key(request)} | asdict(answer), ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Leave the file for the next time."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Leave nothing of it, nor of any process's part."""

        def unlink() -> None:
            for path in self._files():
                path.unlink(missing_ok=True)

        by_first(unlink)


@contextmanager
def answer_store(path: Path | None, *, settings: str) -> Iterator[AnswerStore | None]:
    """A store while the answers are used; nothing is left of it if all went well, and everything if not."""
    if path is None:
        yield None
        return
    store = AnswerStore(path, settings=settings)
    try:
        yield store
    finally:
        store.close()
    store.remove()


def answer_all(
    decoder: Decoder,
    requests: Sequence[Request],
    *,
    decoding: Decoding,
    batch_size: int | None,
    store: AnswerStore | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answers in the order of the requests; those that the store knows are not decoded again.

    Each process decodes its share, and all get every answer.
    """
    known = {} if store is None else _known(requests, store)
    waiting = [index for index in range(len(requests)) if index not in known]

    def decode(mine: list[Request]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        for number, answer in decoder.answers(mine, decoding=decoding, batch_size=batch_size):
            answers[number] = answer
            if store is not None:
                store.add(mine[number], answer)
            if on_progress:
                on_progress(min(len(known) + len(answers) * size(), len(requests)))
        return [answers[number] for number in range(len(mine))]

    queue = [requests[index] for index in waiting]
    new = spread(queue, decode, cost=lambda request: len(request.prompt))
    if store is not None:
        store.know(queue, new)
    answers = known | dict(zip(waiting, new, strict=True))
    return [answers[index] for index in range(len(requests))]


def _known(requests: Sequence[Request], store: AnswerStore) -> dict[int, Answer]:
    keys = [store.key(request) for request in requests]
    return {index: store.known[key] for index, key in enumerate(keys) if key in store.known}
