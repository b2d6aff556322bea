"""`reft infer`: answers of a run to a prompt, to the rows of a file, or in a conversation. stdout has answers only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_cli.cli import console, options
from reft_cli.cli.importing import importing
from reft_cli.cli.infer_rows import answer_rows
from reft_cli.errors import SpecError

if TYPE_CHECKING:
    from reft_cli.generation.settings import Answer
    from reft_cli.runs import Session
    from reft_cli.runs.session import Model

SOURCES = ("--prompt", "--field", "--input", "--chat")
AGAINST = (
    ("--base", "--compare"),
    ("--chat", "--compare"),
    ("--chat", "--json"),
    ("--chat", "--raw"),
    ("--field", "--raw"),
    ("--stream", "--compare"),
    ("--stream", "--json"),
    ("--stream", "--input"),
    ("--samples", "--chat"),
    ("--samples", "--stream"),
)
PARTS = ("importing torch and transformers", "loading the model", "answering")  # what -v tells the time of
NEEDS = {"--output": "--input", "--resume": "--output"}


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
    sets: options.DecodingSets = [],  # noqa: B006  Typer reads the default and never hands it out
    seed: options.Seed = None,
    samples: options.Samples = 1,
    compile: options.Compile = None,
    stream: options.Stream = None,
    raw: Annotated[bool, typer.Option("--raw", help="Use the prompt as it is, without the template.")] = False,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    model: options.BaseModel = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Answer a prompt, the rows of a file, or in a chat."""
    given = {"--prompt": prompt, "--field": field, "--input": source, "--chat": chat, "--output": output}
    given |= {"--resume": resume, "--base": base, "--compare": compare, "--stream": stream, "--raw": raw}
    _check_flags(given | {"--json": as_json, "--samples": samples > 1})
    asked: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    asked |= {"top_k": top_k, "seed": seed, "compile": compile}
    how = How.of(asked, sets, base=base, compare=compare, samples=samples, raw=raw)
    marks = [time.perf_counter()]
    with importing():
        from reft_cli.runs import BasePlace, open_run

    marks.append(time.perf_counter())
    place = BasePlace(model=model, device=device or "auto", device_map=device_map, trust_remote_code=trust_remote_code)
    with open_run(run, checkpoint=checkpoint, place=place) as session:
        marks.append(time.perf_counter())
        if chat:
            _chat(session, how)
        elif source is not None:
            answer_rows(session, source, how, output=output, resume=resume)
        else:
            _answer_one(session, _fields(field) if field else str(prompt), how, as_json=as_json, stream=stream)
        _tell_times([*marks, time.perf_counter()], session, how)


def _tell_times(marks: Sequence[float], session: Session, how: How) -> None:
    """With -v, where the time went, and whether answers came the slower way."""
    spent = [f"{name} {end - start:.2f} s" for name, (start, end) in zip(PARTS, pairwise(marks), strict=True)]
    console.detail(", ".join(spent))
    why_slow = session.why_slow(how.settings) if console.settings.verbose else None
    if why_slow is not None:
        console.detail(f"decoded by transformers' generate: {why_slow}")


@dataclass(frozen=True)
class How:
    """What the flags ask for: settings, the models that answer, how often each, and whether there is no template."""

    settings: dict[str, Any]
    models: Sequence[Model]
    samples: int
    raw: bool

    @classmethod
    def of(
        cls, asked: Mapping[str, Any], sets: Sequence[str], *, base: bool, compare: bool, samples: int, raw: bool
    ) -> How:
        """What was asked for: settings that are not given are the run's own, and flags win over `--set`."""
        from reft_cli.spec.decoding import generation_keys

        models: list[Model] = ["base", "run"] if compare else ["base" if base else "run"]
        given = {key: value for key, value in asked.items() if value is not None}
        return cls(generation_keys(sets) | given, models, samples, raw)

    def answers(
        self, session: Session, prompts: Sequence[str | Mapping[str, Any]]
    ) -> Iterator[dict[Model, list[Answer]]]:
        """For each prompt the answers of each model, as soon as they are known."""
        return session.answers(prompts, settings=self.settings, models=self.models, samples=self.samples, raw=self.raw)

    def one_or_all(self, values: Sequence[Any]) -> Any:  # noqa: ANN401  any JSON value
        """As JSON has it: a list where --samples asked for several."""
        return list(values) if self.samples > 1 else values[0]


def _chat(session: Session, how: How) -> None:
    from reft_cli.cli.chat import Chat

    Chat(session, settings=how.settings, base="base" in how.models).run()


def _check_flags(values: Mapping[str, object]) -> None:
    """SpecError for flags that do not go together; `values` are those of the flags, falsy if not given."""
    given = [flag for flag, value in values.items() if value not in (None, False, [])]
    sources = [flag for flag in given if flag in SOURCES]
    if not sources:
        raise SpecError("nothing to answer; give --prompt TEXT, --field NAME=TEXT, --input FILE or --chat")
    for pair in ((*sources, "", "")[:2], *AGAINST):
        if all(flag in given for flag in pair):
            raise SpecError(f"{pair[0]} and {pair[1]} do not go together; give one of them")
    for flag, other in NEEDS.items():
        if flag in given and other not in given:
            raise SpecError(f"{flag} goes with {other}")


def _fields(given: Sequence[str]) -> dict[str, str]:
    """`name=text` flags as a row."""
    pairs = [text.partition("=") for text in given]
    wrong = [text for text, (name, sign, _) in zip(given, pairs, strict=True) if not (name and sign)]
    if wrong:
        raise SpecError(f"--field {wrong[0]}: write NAME=TEXT")
    return {name: text for name, _, text in pairs}


def _answer_one(
    session: Session, row: str | Mapping[str, Any], how: How, *, as_json: bool, stream: bool | None
) -> None:
    live = console.is_terminal(sys.stdout) if stream is None else stream
    if live and not as_json and len(how.models) == how.samples == 1:
        write_stream(session.stream(row, settings=how.settings, base="base" in how.models, raw=how.raw))
        return
    found = next(how.answers(session, [row]))
    if as_json:
        facts = {
            name: how.one_or_all(
                [{"answer": each.text, "tokens": each.tokens, "finished": each.finished} for each in answers]
            )
            for name, answers in found.items()
        }
        several = {"answers": facts[how.models[0]]} if how.samples > 1 else facts[how.models[0]]
        console.result_json({"prompt": row} | (facts if len(found) > 1 else several))
    elif len(found) > 1 and console.is_terminal(sys.stdout):
        _side_by_side({name: "\n".join(each.text.strip() for each in answers) for name, answers in found.items()})
    else:
        for name, answers in found.items():
            for answer in answers:
                console.result((f"{name}: " if len(found) > 1 else "") + answer.text.strip())


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
