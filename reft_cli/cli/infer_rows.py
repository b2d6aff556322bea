"""`reft infer --input`: the rows of a file, or of standard input, with their answers; one JSON line each, resumable."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from reft_cli.cli import console
from reft_cli.cli.progress import progress
from reft_cli.errors import DataError, SpecError, reason_of

if TYPE_CHECKING:
    from reft_cli.cli.infer import How
    from reft_cli.data.records import Rows
    from reft_cli.runs import Session
    from reft_cli.runs.session import Model

ADDED: dict[Model, str] = {"run": "prediction", "base": "base_prediction"}  # model -> the key of its answer


def answer_rows(session: Session, source: str, how: How, *, output: Path | None, resume: bool) -> None:
    """Rows in, the same rows with `prediction` (and `base_prediction`) out, in their order."""
    rows = _read_stdin() if source == "-" else _read_file(source)
    prompts = [_prompt(session, rows, index, raw=how.raw) for index in range(len(rows))]
    done = _done(output, rows, resume=resume)
    with progress(live=output is not None) as observer, _opened(output) as file:
        observer.on_start(len(rows), done, {"verb": "answering", "unit": "row"})
        found = how.answers(session, prompts[done:])
        for number, (row, answers) in enumerate(zip(rows.rows[done:], found, strict=True), start=done + 1):
            line = row | {ADDED[name]: how.one_or_all([each.text for each in texts]) for name, texts in answers.items()}
            file.write(console.encodable_json(line, encoding=file.encoding) + "\n")
            file.flush()
            observer.on_progress(number, len(rows))
    if output is not None:
        console.result(str(output))


def _read_file(path: str) -> Rows:
    from reft_cli.data.records import Source, read_rows

    return read_rows(Source(path=path))


def _read_stdin() -> Rows:
    from reft_cli.data.records import parse_jsonl

    try:
        rows = parse_jsonl(sys.stdin.buffer, name="stdin")
    except DataError as error:
        hint = 'One JSON object a line is needed, for example {"prompt": "..."}; for one text use --prompt'
        raise DataError(replace(error.problems[0], hint=hint)) from error
    if not rows.rows:
        raise DataError("stdin: no rows")
    return rows


def _prompt(session: Session, rows: Rows, index: int, *, raw: bool) -> str | Mapping[str, Any]:
    """What is answered for a row: the fields of the run's format, or with --raw its column `prompt`."""
    row, where = rows.rows[index], rows.where(index)
    taken = [name for name in ADDED.values() if name in row]
    if taken:
        raise DataError(f"{where}: has a column `{taken[0]}`, where the answer goes; rename it")
    if not raw:
        return session.text.data_format.fields_of(row, where=where, with_answer=False)
    if not isinstance(row.get("prompt"), str):
        raise DataError(f"{where}: --raw takes the text of column `prompt`; there are {', '.join(row)}")
    return str(row["prompt"])


def _done(output: Path | None, rows: Rows, *, resume: bool) -> int:
    """How many rows an output that is gone on with has; a line that a kill tore is taken off."""
    if output is None or not output.exists():
        return 0
    if not resume:
        raise SpecError(f"{output} exists; go on with it by --resume, or write another file")
    content = _content(output)
    whole = content[: content.rfind(b"\n") + 1]
    for index, line in enumerate(whole.split(b"\n")[:-1]):
        if index >= len(rows) or _answered(line) != json.loads(console.encodable_json(rows.rows[index], encoding=None)):
            raise SpecError(
                f"{output}:{index + 1} is not the answer to row {index + 1} of {rows.name}; write another file"
            )
    if whole != content:
        output.write_bytes(whole)
    return whole.count(b"\n")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {reason_of(error)}") from error


def _answered(line: bytes) -> Any:  # noqa: ANN401  any JSON value, or None for what is none
    """The row that a line of an output answers."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return {key: value for key, value in row.items() if key not in ADDED.values()} if isinstance(row, dict) else row


@contextmanager
def _opened(path: Path | None) -> Iterator[TextIO]:
    """The output file, or stdout, which stays open."""
    if path is None:
        yield sys.stdout
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{path}: cannot be written: {reason_of(error)}") from error
    with file:
        yield file
