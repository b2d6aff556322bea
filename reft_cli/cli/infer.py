"""`reft infer`: answers of a run to a prompt, to the rows of a file, or in a conversation. stdout has answers only."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from reft_cli.cli import console, options
from reft_cli.cli.progress import progress
from reft_cli.errors import DataError, Problem, SpecError

if TYPE_CHECKING:
    from reft_cli.data.records import Rows
    from reft_cli.runs import Session

CHUNK = 256  # rows answered before their lines are written
ADDED = ("prediction", "base_prediction")
Settings = dict[str, int | float | None]


def infer(
    run: options.RunPath,
    prompt: Annotated[str | None, typer.Option("--prompt", help="One prompt.", metavar="TEXT")] = None,
    field: Annotated[
        list[str],
        typer.Option("--field", help="A column of the one row to answer. May be repeated.", metavar="NAME=TEXT"),
    ] = [],  # noqa: B006  Typer reads the default and never hands it out
    source: Annotated[
        str | None, typer.Option("--input", help="Rows to answer, one JSON line each out; - is stdin.", metavar="FILE")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="A conversation; /help tells its commands.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the JSON lines of --input there.", metavar="FILE")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an --output that is not complete.")] = False,
    checkpoint: options.Checkpoint = None,
    base: Annotated[bool, typer.Option("--base", help="Answer with the base model, without the intervention.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with both models.")] = False,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Show the answer as it grows.", show_default="on a terminal"),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Use the prompt as it is, without the template.")] = False,
    device: options.Device = None,
    model: options.BaseModel = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Answer a prompt, the rows of a file, or in a chat."""
    _check_flags(prompt, field, source, chat=chat, output=output, resume=resume, both=base and compare)
    settings: Settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    models = ["base", "run"] if compare else ["base" if base else "run"]
    from reft_cli import runs

    with runs.open_run(
        run, checkpoint=checkpoint, device=device, model=model, trust_remote_code=trust_remote_code
    ) as session:
        if chat:
            from reft_cli.cli.chat import Chat

            Chat(
                session, settings={key: value for key, value in settings.items() if value is not None}, base=base
            ).run()
        elif source is not None:
            _answer_rows(session, source, settings, models=models, raw=raw, output=output, resume=resume)
        else:
            row = _fields(field) if field else str(prompt)
            live = console.is_terminal(sys.stdout) if stream is None else stream
            _answer_one(session, row, settings, models=models, raw=raw, as_json=as_json, stream=live)


def _check_flags(
    prompt: str | None,
    field: Sequence[str],
    source: str | None,
    *,
    chat: bool,
    output: Path | None,
    resume: bool,
    both: bool,
) -> None:
    given = [
        flag
        for flag, is_given in (
            ("--prompt", prompt is not None),
            ("--field", bool(field)),
            ("--input", source is not None),
            ("--chat", chat),
        )
        if is_given
    ]
    if not given:
        raise SpecError("nothing to answer; give --prompt TEXT, --field NAME=TEXT, --input FILE or --chat")
    if len(given) > 1:
        raise SpecError(f"{' and '.join(given)} do not go together; give one of them")
    if both:
        raise SpecError("--base answers with the base only and --compare with both; give one of them")
    if output is not None and source is None:
        raise SpecError("--output goes with --input; for one answer write > FILE")
    if resume and output is None:
        raise SpecError("--resume goes with --output")


def _fields(given: Sequence[str]) -> dict[str, str]:
    """`name=text` flags as a row."""
    pairs = [text.partition("=") for text in given]
    wrong = [text for text, (name, sign, _) in zip(given, pairs, strict=True) if not (name and sign)]
    if wrong:
        raise SpecError(f"--field {wrong[0]}: write NAME=TEXT")
    return {name: text for name, _, text in pairs}


# ---- one prompt


def _answer_one(
    session: Session,
    row: str | Mapping[str, Any],
    settings: Settings,
    *,
    models: Sequence[str],
    raw: bool,
    as_json: bool,
    stream: bool,
) -> None:
    if raw and not isinstance(row, str):
        raise SpecError("--raw has no template, so there are no fields; give --prompt")
    if stream and not as_json and len(models) == 1:
        write_stream(session.stream(row, settings=settings, base=models == ["base"], raw=raw))
        return
    answers = {name: session.answer([row], settings=settings, base=name == "base", raw=raw)[0] for name in models}
    if as_json:
        facts = {
            name: {"answer": answer.text, "tokens": answer.tokens, "finished": answer.finished}
            for name, answer in answers.items()
        }
        console.result_json({"prompt": row} | (facts if len(models) > 1 else facts[models[0]]))
    elif len(models) == 1:
        console.result(answers[models[0]].text.strip())
    elif console.is_terminal(sys.stdout):
        _side_by_side({name: answer.text.strip() for name, answer in answers.items()})
    else:
        for name, answer in answers.items():
            console.result(f"{name}: {answer.text.strip()}")


def write_stream(pieces: Iterator[str]) -> str:
    """Write an answer as it grows, without the white space around it; returns it whole."""
    text, shown = "", 0
    for piece in pieces:
        text += piece
        ready = len(text.rstrip())
        if ready > shown:
            sys.stdout.write(text[shown:ready].lstrip() if not text[:shown].strip() else text[shown:ready])
            sys.stdout.flush()
            shown = ready
    console.result("")
    return text


def _side_by_side(texts: Mapping[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    for name in texts:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*map(Text, texts.values()))
    console.result_rich(table)


# ---- rows


def _answer_rows(
    session: Session,
    source: str,
    settings: Settings,
    *,
    models: Sequence[str],
    raw: bool,
    output: Path | None,
    resume: bool,
) -> None:
    """Rows in, the same rows with `prediction` (and `base_prediction`) out, in their order."""
    rows = _read_stdin() if source == "-" else _read_file(source)
    prompts = [_prompt(session, rows, index, raw=raw) for index in range(len(rows))]
    done = _done(output, rows, resume=resume)
    with progress(live=output is not None) as observer, _opened(output) as file:
        observer.on_start(len(rows), done, {"verb": "answering", "unit": "row"})
        for start in range(done, len(rows), CHUNK):
            chunk = slice(start, start + CHUNK)
            found = {
                ADDED[name == "base"]: session.answer(prompts[chunk], settings=settings, base=name == "base", raw=raw)
                for name in models
            }
            for offset, row in enumerate(rows.rows[chunk]):
                line = row | {key: answers[offset].text for key, answers in found.items()}
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            file.flush()
            observer.on_progress(min(start + CHUNK, len(rows)), len(rows))
    if output is not None:
        console.result(str(output))


def _read_file(path: str) -> Rows:
    from reft_cli.data.records import Source, read_rows

    return read_rows(Source(path=path))


def _read_stdin() -> Rows:
    from reft_cli.data.records import Rows

    lines = [(number, line) for number, line in enumerate(sys.stdin, start=1) if line.strip()]
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            hint = 'One JSON object a line is needed, for example {"prompt": "..."}; for one text use --prompt'
            raise DataError(Problem("not a JSON object", file="stdin", line=number, column=1, hint=hint))
        rows.append(row)
    if not rows:
        raise DataError("stdin: no rows")
    return Rows("stdin", rows, [*range(1, len(rows) + 1)], [number for number, _ in lines])


def _prompt(session: Session, rows: Rows, index: int, *, raw: bool) -> str | Mapping[str, Any]:
    """What is answered for a row: the fields of the run's format, or with --raw its column `prompt`."""
    row, where = rows.rows[index], rows.where(index)
    taken = [name for name in ADDED if name in row]
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
    text = output.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    for index, line in enumerate(whole.splitlines()):
        row = {key: value for key, value in json.loads(line).items() if key not in ADDED}
        if index >= len(rows) or row != json.loads(json.dumps(rows.rows[index], default=str)):
            raise SpecError(
                f"{output}:{index + 1} is not the answer to row {index + 1} of {rows.name}; write another file"
            )
    if whole != text:
        output.write_text(whole, encoding="utf-8")
    return whole.count("\n")


class _opened:
    """The output file, or stdout, which stays open."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._file = path, sys.stdout

    def __enter__(self) -> TextIO:
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", encoding="utf-8")
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise SpecError(f"{self._path}: cannot be written: {reason}") from error
        return self._file

    def __exit__(self, *exception: object) -> None:
        if self._path is not None:
            self._file.close()
