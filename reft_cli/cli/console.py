"""The two streams: stdout carries the result and nothing else, stderr carries everything else.

No ANSI codes on a stream that is not a terminal, whatever the environment forces. NO_COLOR and TERM=dumb are honoured.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from reft_cli.environment import blotted
from reft_cli.errors import ReftError, exit_code
from reft_cli.parallel.world import is_ours
from reft_cli.writing import finite

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

GAP, NARROWEST = 2, 6  # between columns of a table, and what a text has at least where names and numbers stay whole
QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
}
BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")  # read as the libraries are imported
BAR_SWITCHES = {  # for those that are imported already; transformers follows the hub's variable
    "transformers.utils.logging": "disable_progress_bar",
    "huggingface_hub.utils.tqdm": "disable_progress_bars",
    "datasets.utils.tqdm": "disable_progress_bars",
}
LOGGERS = ("transformers", "datasets", "accelerate", "huggingface_hub", "torch", "urllib3", "httpx", "filelock")


@dataclass
class Settings:
    """What the global flags say; one object for the process, made anew by `main`."""

    json: bool = False
    verbose: bool = False
    quiet: bool = False
    progress: bool = True
    run: Path | None = None
    """The run folder at work, where a traceback belongs."""
    words: tuple[str, ...] = ()
    """The command line."""
    speaks: bool = True
    """False in all but the first of a run's processes, which speaks for the others."""


settings = Settings()


def reset(words: Sequence[str]) -> None:
    """Start with the flags' defaults for a command line, and with the libraries quiet."""
    defaults = Settings(json="--json" in words, words=tuple(words))
    for field in fields(Settings):
        setattr(settings, field.name, getattr(defaults, field.name))
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    still_bars()
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=rf"({'|'.join(LOGGERS)})\b")
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal's encoding lacks must not end the program
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def still_bars() -> None:
    """No progress bars but our own, whether the libraries are imported already or yet to be."""
    os.environ.update(dict.fromkeys(BARS, "1"))
    for module, switch in BAR_SWITCHES.items():
        if module in sys.modules:
            getattr(sys.modules[module], switch)()


def be_verbose() -> None:
    """Let details and the libraries' own messages through; their bars too if a person watches."""
    settings.verbose = True
    for name, value in (QUIET_LIBRARIES | dict.fromkeys(BARS if is_live() else (), "1")).items():
        if os.environ.get(name) == value:
            del os.environ[name]
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.NOTSET)
    warnings.filterwarnings("default", module=rf"({'|'.join(LOGGERS)})\b")


def is_terminal(stream: TextIO) -> bool:
    """Whether a person reads the stream through something that understands ANSI codes."""
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


def is_live() -> bool:
    """Whether stderr can show something that moves, and it is wanted."""
    return is_terminal(sys.stderr) and settings.progress and settings.speaks and not settings.quiet


def rich_console(stream: TextIO) -> Console:
    """A Rich console on a stream; wide when not a terminal, so that nothing is cut or wrapped."""
    from rich.console import Console

    terminal = is_terminal(stream)
    return Console(file=stream, force_terminal=terminal, width=None if terminal else 10_000, highlight=False)


# ---- stdout


def result(text: str) -> None:
    """Print the result, or one line of it."""
    if not settings.speaks:
        return
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def result_json(value: Any) -> None:  # noqa: ANN401  any JSON value
    """Print one JSON value on one line."""
    result(encodable_json(value, encoding=sys.stdout.encoding))


def encodable_json(value: Any, *, encoding: str | None) -> str:  # noqa: ANN401  any JSON value
    """A JSON value on one line; NaN and infinity are null, other Python objects their text.

    Letters stand as they are unless the encoding lacks one, as it does half of a surrogate pair; then all are escaped.
    """
    value = finite(value)
    line = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    try:
        line.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, default=str)
    return line


def result_rich(renderable: RenderableType) -> None:
    """Print something of Rich's; plain text when stdout is not a terminal."""
    console = rich_console(sys.stdout)
    with console.capture() as capture:
        console.print(renderable, soft_wrap=not is_terminal(sys.stdout))
    result("\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n")))


def result_table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """Print aligned columns; those named in `right` hold numbers.

    On a terminal that is too narrow, texts are broken over lines, names and numbers only if nothing else helps.
    """
    from rich.table import Table
    from rich.text import Text

    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = _whole_columns(headers, cells, right=right, room=rich_console(sys.stdout).width)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0), show_header=any(headers))
    for header, width in zip(headers, widths, strict=True):
        justify: Literal["left", "right"] = "right" if header in right else "left"
        table.add_column(Text(header), justify=justify, overflow="fold", width=width)
    for row in cells:
        table.add_row(*map(Text, row))
    result_rich(table)


def _whole_columns(
    headers: Sequence[str], cells: Sequence[Sequence[str]], *, right: Sequence[str], room: int
) -> list[int | None]:
    """Of a table that is wider than the room, widths of the first column and of numbers; None: what room is left.

    Headers may be broken between words.
    """
    columns = [list(column) for column in zip(headers, *cells, strict=True)]
    gaps = GAP * (len(columns) - 1)
    needed = [max(map(len, [*column[1:], *column[0].split(), ""])) for column in columns]
    fixed = [width if index == 0 or columns[index][0] in right else None for index, width in enumerate(needed)]
    too_wide = sum(max(map(len, column)) for column in columns) + gaps > room
    fits = sum(NARROWEST if width is None else width for width in fixed) + gaps <= room
    return fixed if too_wide and fits else [None] * len(columns)


# ---- stderr


def say(text: str) -> None:
    """Print a line for the person who waits; silent with -q."""
    if settings.speaks and not settings.quiet:
        complain(text)


def detail(text: str) -> None:
    """Print a line that only -v shows."""
    if settings.speaks and settings.verbose:
        complain(text)


def warn(text: str) -> None:
    """Print a warning."""
    if settings.speaks:
        complain(f"warning: {text}")


def fail(error: ReftError) -> int:
    """Print an error as text or as a JSON object; returns the exit code.

    A process that does not speak tells only a parent of ours, who passes it on if nobody else has said it.
    """
    code = exit_code(error)
    if not (settings.speaks or is_ours()):
        return code
    if settings.json:
        first, *others = [asdict(problem) for problem in error.problems]
        found = {"code": code, "kind": error.kind, **first}
        fail_json(found | ({"problems": [first, *others]} if others else {}))
    else:
        for problem in error.problems:
            complain(str(problem))
            if problem.hint and problem.hint not in problem.message:
                complain(f"  {problem.hint}")
    return code


def fail_json(error: dict[str, Any]) -> None:
    """Print the one JSON object that stands for a failure."""
    complain(json.dumps({"error": error}, ensure_ascii=False))


def complain(text: str) -> None:
    """Print a line on stderr, whatever the flags; no secret. Where nobody reads it any more, work goes on unheard."""
    try:
        sys.stderr.write(blotted(text) + "\n")
        sys.stderr.flush()
    except BrokenPipeError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """From now on what is written to a stream of this process goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
