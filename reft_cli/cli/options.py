"""Flags that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_cli.cli import console


def _verbose(given: bool) -> None:
    if given:
        console.be_verbose()


def _quiet(given: bool) -> None:
    if given:
        console.settings.quiet = True
        console.still_bars()


def _no_progress(given: bool) -> None:
    if given:
        console.settings.progress = False
        console.still_bars()


Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Say more, the libraries' own messages included.", callback=_verbose)
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only results, warnings and errors.", callback=_quiet)]
NoProgress = Annotated[
    bool, typer.Option("--no-progress", help="Plain lines in place of a live display.", callback=_no_progress)
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; errors as JSON on stderr.")]

SpecFile = Annotated[Path, typer.Argument(help="The YAML spec.", metavar="SPEC", show_default=False)]
RunPath = Annotated[
    Path,
    typer.Argument(help="A run folder, a checkpoint folder, or RUN/best.", metavar="RUN", show_default=False),
]
Sets = Annotated[
    list[str],
    typer.Option("--set", help="Replace a key of the spec, e.g. train.epochs=5. May be repeated.", metavar="KEY=VALUE"),
]
Checkpoint = Annotated[
    str | None,
    typer.Option("--checkpoint", help="best, last or a step. Without it the best, else the last.", metavar="WHICH"),
]
Processes = Annotated[
    int | None, typer.Option("--processes", help="Share the rows out over N processes; without it, one a GPU.", min=1)
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, mps, cuda or cuda:N; without it the fastest.", metavar="DEVICE")
]
DeviceMap = Annotated[
    str | None,
    typer.Option("--device-map", help="auto: lay the base out over all GPUs, memory and disk.", metavar="auto"),
]
BaseModel = Annotated[
    str | None, typer.Option("--model", help="Where the base model lies now, if it has moved.", metavar="NAME")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the base's repository brings.")
]

Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks", help="Tasks of lm-evaluation-harness in place of data, e.g. arc_easy,hellaswag.", metavar="NAMES"
    ),
]
TaskFolder = Annotated[
    Path | None, typer.Option("--task-folder", help="Folder with tasks of your own for --tasks (YAML).", metavar="DIR")
]
FewShot = Annotated[
    int | None, typer.Option("--few-shot", help="Solved rows before each prompt of --tasks.", min=0, metavar="N")
]
ChatTemplate = Annotated[bool, typer.Option("--chat", help="Prompts of --tasks through the chat template.")]

MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", help="Longest answer.", min=1, metavar="N")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="0: always the same answer; above: sampling.", min=0, metavar="T")
]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="Probability that is sampled from.", min=1e-9, max=1, metavar="P")
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Tokens that are sampled from; 0: all.", min=0, metavar="K")]
Stream = Annotated[
    bool | None,
    typer.Option("--stream/--no-stream", help="Show the answer as it grows.", show_default="on a terminal"),
]
DecodingSets = Annotated[
    list[str],
    typer.Option(
        "--set", help="Change how answers are decoded, e.g. generation.beams=4. May be repeated.", metavar="KEY=VALUE"
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", help="Only the first N rows of each source.", min=1, metavar="N")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Prompts decoded together.", min=1, metavar="N")]
FailUnder = Annotated[
    list[str],
    typer.Option("--fail-under", help="Exit with 7 below this, e.g. accuracy=0.6.", metavar="METRIC=X"),
]
Compile = Annotated[
    str | None,
    typer.Option("--compile", help="torch.compile of the steps: auto, on or off; auto: on long jobs.", metavar="WHEN"),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Of the sampling.", min=0, metavar="N")]
Samples = Annotated[
    int,
    typer.Option(
        "--samples", help="Answers to each prompt; with a temperature, or the best beams.", min=1, metavar="N"
    ),
]
