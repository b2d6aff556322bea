"""`reft check`: what a spec would do. The data, one row as the model sees it, the parameters, memory and steps."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from reft_cli.cli import console, options, progress
from reft_cli.cli.beside import looking_beside
from reft_cli.cli.fetching import tell_of_fetching
from reft_cli.cli.importing import importing

if TYPE_CHECKING:
    from rich.text import Text

    from reft_cli.data.report import DataReport, Token
    from reft_cli.runs import CheckReport
    from reft_cli.runs.check import ModelReport, SuiteReport
    from reft_cli.runs.estimate import Estimate
    from reft_cli.runs.execution import Execution

SHOWN = 24  # classes
ESCAPES = str.maketrans({"\n": "\\n", "\t": "\\t", "\r": "\\r"})


def check(
    spec: options.SpecFile,
    sets: options.Sets = [],  # noqa: B006  Typer reads the default and never hands it out
    rows: Annotated[int, typer.Option("--rows", help="Training rows to show token by token.", min=0)] = 1,
    no_model: Annotated[bool, typer.Option("--no-model", help="Load the tokenizer only, not the weights.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Show where the memory goes.")] = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what a spec would do, without training."""
    from reft_cli.spec import load_spec

    loaded = load_spec(spec, overrides=sets)
    with importing():
        from reft_cli import runs

    tell_of_fetching(loaded.spec.model)
    with looking_beside(spec):
        report = runs.check(loaded, with_model=not no_model, rows=rows)
    flags = shlex.join(part for each in sets for part in ("--set", each))
    report = replace(report, next_command=f"{report.next_command} {flags}".rstrip())
    if as_json:
        console.result_json(report.to_dict() | {"warnings": report.warnings})
        return
    _print(report, memory=memory)
    for warning in report.warnings:
        console.warn(warning)


def _print(report: CheckReport, *, memory: bool) -> None:
    facts = [["spec", f"{report.spec}: ok"]]
    if report.suite:
        facts += _suite_facts(report.suite)
    if report.model:
        facts += _model_facts(report.model, memory=memory)
    each = f"{report.steps_per_epoch:,} an epoch"
    facts.append(["steps", f"{report.steps:,} ({each})"])
    console.result_table(["", ""], facts)
    console.result("")
    _print_data(report.data)
    for row in report.rows:
        console.result(f"\nrow {row.row}")
        if console.is_terminal(sys.stdout):
            console.result_rich(painted(row.tokens))
        else:
            console.result(marked(row.tokens))
    console.result(f"\nnext: {report.next_command}")


def _suite_facts(suite: SuiteReport) -> list[list[str]]:
    recipe = f", recipe {suite.recipe}" if suite.recipe else ""
    facts = [["suite", f"{suite.name}{recipe}: {', '.join(suite.keys)}"]]
    facts += [["not of it", ", ".join(suite.replaced)]] if suite.replaced else []
    return facts + [["note", note] for note in suite.notes]


def _model_facts(model: ModelReport, *, memory: bool) -> list[list[str]]:
    estimate = model.estimate
    peak = progress.gibibytes(estimate.memory_bytes)
    work = f"{progress.thousands(estimate.tokens)} tokens, {estimate.operations:.1e} operations"
    if estimate.seconds is not None:
        work += f", about {progress.duration(estimate.seconds)} here"
    measured = "measured on the longest rows" if estimate.measured_bytes else "for training"
    return [
        ["model", f"{model.name}: {model.base_parameters:,} parameters, {model.dtype} on {model.device}"],
        *([["placement", _places(model.places)]] if model.places else []),
        ["trainable", f"{model.trainable_parameters:,} ({model.percent:.3g} %) = {model.arithmetic}"],
        *_execution_facts(model.execution),
        ["memory", f"about {peak} {measured}"],
        *(_memory_facts(estimate) if memory else []),
        ["work", work],
    ]


def _places(places: dict[str, int]) -> str:
    return ", ".join(f"{count} blocks on {place}" for place, count in places.items())


def _memory_facts(estimate: Estimate) -> list[list[str]]:
    """The parts of a prediction, and what a pass came to where it was measured."""
    parts = {
        "weights": estimate.weights_bytes,
        f"a pass of {estimate.pass_tokens:,} tokens": estimate.activation_bytes,
        "trained, gradients and moments": estimate.trainable_bytes,
        "predicted": estimate.predicted_bytes,
        "measured": estimate.measured_bytes,
    }
    shown = [f"{name} {progress.gibibytes(size)}" for name, size in parts.items() if size is not None]
    return [["  of it", "; ".join(shown)]]


def _execution_facts(chosen: Execution) -> list[list[str]]:
    ways = {
        "layout": chosen.packed,
        "compiled": chosen.compiled,
        "CUDA graphs": chosen.recorded,
        "frozen cache": chosen.cached,
        "shared head": chosen.shared,
    }
    shown = {name: "yes" if way.taken else "no" for name, way in ways.items()} | {"layout": chosen.layout}
    return [[name, f"{shown[name]}: {way.reason}" if way.reason else shown[name]] for name, way in ways.items()]


def _print_data(data: dict[str, DataReport]) -> None:
    counts = ["rows", "used", "dropped", "cut"]
    lengths = ["prompt p50", "p95", "max", "answer p50", "p95", "max"]
    lines = []
    for split, report in data.items():
        kept = report.counts
        spans = (report.prompt, report.answer)
        numbers = [kept.read, kept.used, kept.dropped.count, kept.cut.count]
        numbers += [value for span in spans for value in (span.p50, span.p95, span.max)]
        lines.append([split, report.name, *(f"{number:,}" for number in numbers)])
    console.result_table(["split", "data", *counts, *lengths], lines, right=[*counts, *lengths])
    for split, report in data.items():
        if report.labels:
            console.result(f"{split} labels: {_classes(report.labels)}")


def _classes(rows: dict[str, int]) -> str:
    """Classes with their rows; of many the first ones."""
    shown = [f"{name} {count:,}" for name, count in list(rows.items())[:SHOWN]]
    return ", ".join(shown) + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")


def marked(tokens: Iterable[Token]) -> str:
    """One line: `[f3+l3]Review: A[/] slow film[f3+l3]\\nSentiment:[/][answer] negative[/]`."""
    return "".join(f"[{mark}]{text}[/]" if mark else text for mark, text in _stretches(tokens)).translate(ESCAPES)


def _stretches(tokens: Iterable[Token]) -> Iterator[tuple[str, str]]:
    """(mark, text) of tokens that are alike; the mark of plain prompt is empty."""

    def mark(token: Token) -> str:
        return " ".join([*token.groups, *(["answer"] if token.is_answer else [])])

    for name, alike in groupby(tokens, key=mark):
        yield name, "".join(token.text for token in alike)


def painted(tokens: Iterable[Token]) -> Text:
    """For a terminal: the prompt dim, the answer green, edited tokens underlined."""
    from rich.text import Text

    text = Text()
    for token in tokens:
        style = "green" if token.is_answer else "dim"
        text.append(token.text, style=f"{style} underline" if token.groups else style)
    return text
