"""`reft runs`: the runs in a folder, one in full, what two differ in, and their curves. Reads files, never tensors."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_cli.cli import console, options
from reft_cli.cli.curves import VALIDATION, Curve, curves_of, drawn, write_picture
from reft_cli.errors import CheckpointError, SpecError
from reft_cli.evaluation.metrics import LOWER_IS_BETTER

if TYPE_CHECKING:
    from reft_cli.runfolder import RunFolder

app = typer.Typer(
    name="runs",
    help="List runs, show one, compare two, plot some.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Run = Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN", show_default=False)]


@app.command("ls")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="Where the runs lie.")] = Path("runs"),
    sort: Annotated[
        str, typer.Option("--sort", help="run, status, step, started, seconds, or a validation score (best first).")
    ] = "started",
    as_json: options.AsJson = False,
) -> None:
    """List the runs in a folder."""
    from reft_cli.runfolder import runs_in

    if not folder.is_dir():
        raise SpecError(f"{folder} does not exist; give the folder that holds the runs")
    rows = _sorted([_row(run) for run in runs_in(folder)], sort)
    if as_json:
        console.result_json(rows)
        return
    if not rows:
        inside = folder / "runs"
        console.say(f"no runs in {folder}" + (f"; see reft runs ls {inside}" if inside.is_dir() else ""))
        return
    scores = sorted({name for row in rows for name in row["scores"]})
    headers = ["run", "status", "step", *scores, "method", "model", "started", "seconds"]
    table = [[row["scores"].get(key, row.get(key)) for key in headers] for row in rows]
    for line in table:
        line[headers.index("started")] = _minute(line[headers.index("started")])
    console.result_table(
        headers, [[_cell(value) for value in line] for line in table], right=["step", "seconds", *scores]
    )


@app.command("show")
def show_run(run: Run, as_json: options.AsJson = False) -> None:
    """Show all that is known of a run."""
    folder = _open(run)
    row = _row(folder)
    whole = row | {
        "record": folder.read(),
        "spec": folder.read_spec(),
        "checkpoints": [path.name for path in folder.checkpoints()],
        "evaluations": folder.evaluations(),
    }
    if as_json:
        console.result_json(whole)
        return
    lines = {key: value for key, value in row.items() if key != "scores"}
    lines |= {"checkpoints": ", ".join(whole["checkpoints"]) or "none"} | _all_scores(folder)
    facts = {
        key: value if key != "command" else shlex.join(["reft", *value[1:]])
        for key, value in whole["record"].items()
        if key not in {"reft_run", "name", "attempts"} and key not in row
    }
    console.result_table(["", ""], [[key, _cell(value)] for key, value in (lines | _flat(facts)).items()])
    for name, curve in curves_of(folder).items():
        if len(curve) > 1:
            console.result("\n".join(["", *drawn(name, curve)]))


@app.command("plot")
def plot_runs(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN...", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The picture (.png, .svg, .pdf); curves.png in a lone run, else here."),
    ] = None,
    metric: Annotated[
        list[str], typer.Option("--metric", help="Only this curve, e.g. loss. May be repeated.", metavar="NAME")
    ] = [],  # noqa: B006  Typer reads the default and never hands it out
    as_json: options.AsJson = False,
) -> None:
    """Write the curves of loss and validation scores as a picture."""
    folders = [_open(run) for run in runs]
    curves = {str(folder.path): _chosen(curves_of(folder), metric) for folder in folders}
    if not any(curves.values()):
        raise SpecError(f"{runs[0]} has no step in its metrics.jsonl yet; there is nothing to plot")
    path = output or (folders[0].path if len(folders) == 1 else Path()) / "curves.png"
    write_picture(path, curves)
    if as_json:
        console.result_json({"path": str(path), "curves": curves})
    else:
        console.result(str(path))


def _chosen(curves: dict[str, Curve], wanted: list[str]) -> dict[str, Curve]:
    """The curves that were asked for; `validation_loss` is `validation loss` too."""
    names = [name.replace("_", " ", 1) if name.startswith(VALIDATION) else name for name in wanted]
    for given, name in zip(wanted, names, strict=True):
        if curves and name not in curves:
            raise SpecError(f"--metric {given}: a run has no such curve; it has {', '.join(curves)}")
    return {name: curve for name, curve in curves.items() if not names or name in names}


@app.command("diff")
def compare_runs(
    first: Annotated[Path, typer.Argument(metavar="A", help="A run folder.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    as_json: options.AsJson = False,
) -> None:
    """Show the keys of the spec and the scores in which two runs differ."""
    folders = _open(first), _open(second)
    specs = _different(*(_flat(folder.read_spec()) for folder in folders))
    scores = _different(*(_all_scores(folder) for folder in folders))
    if as_json:
        console.result_json({"spec": specs, "scores": scores})
        return
    if not specs and not scores:
        console.say("the two runs have the same spec and the same scores")
        return
    rows = [[key, *map(_cell, pair)] for key, pair in (specs | scores).items()]
    console.result_table(["", str(first), str(second)], rows)


def _open(path: Path) -> RunFolder:
    from reft_cli.runfolder import RunFolder, find

    if RunFolder(path).exists():
        return RunFolder(path)
    found = find(path).run
    if found is None:
        raise CheckpointError(f"{path} is a checkpoint that lies in no run folder")
    return found


def _row(run: RunFolder) -> dict[str, Any]:
    """What a line of `ls` tells."""
    from reft_cli.runfolder import step_of

    record, spec = run.read(), run.read_spec()
    step, scores = run.scores() or (None, {})
    newest = run.checkpoints()[-1:]
    return {
        "run": str(run.path),
        "status": run.status(),
        "step": step if step is not None else step_of(newest[0]) if newest else None,
        "method": spec.get("intervention", {}).get("method"),
        "model": spec.get("model", {}).get("name"),
        "started": record.get("started"),
        "seconds": _seconds(record.get("started"), record.get("ended")),
        "scores": scores,
    }


def _all_scores(run: RunFolder) -> dict[str, Any]:
    """Validation scores of the best checkpoint and those of every evaluation."""
    _, scores = run.scores() or (None, {})
    found: dict[str, Any] = {f"validation {name}": value for name, value in scores.items()}
    for name, report in run.evaluations().items():
        found |= {f"{name} {key}": value for key, value in _flat(report.get("metrics", {})).items()}
    return found


def _flat(tree: Mapping[str, Any], *, above: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{above}.{key}" if above else str(key)
        leaves |= _flat(value, above=name) if isinstance(value, Mapping) and value else {name: value}
    return leaves


def _different(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    keys = [*first, *(key for key in second if key not in first)]
    return {key: [first.get(key), second.get(key)] for key in keys if first.get(key) != second.get(key)}


def _sorted(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """By a column, or by a score with the best first; what lacks it comes last."""
    if key in {"run", "status", "step", "started", "seconds", "method", "model"}:
        return sorted(rows, key=lambda row: (row[key] is None, row[key]))
    known = sorted({name for row in rows for name in row["scores"]})
    if rows and key not in known:
        raise SpecError(
            f"--sort {key}: no run has it; there are run, status, step, started, seconds, {', '.join(known)}"
        )
    sign = 1 if key in LOWER_IS_BETTER else -1
    return sorted(rows, key=lambda row: (key not in row["scores"], sign * row["scores"].get(key, 0)))


def _seconds(started: str | None, ended: str | None) -> float | None:
    if not started or not ended:
        return None
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds()


def _minute(moment: str | None) -> str | None:
    """`2026-11-22T14:07:25+00:00` as a table has it."""
    return moment and f"{datetime.fromisoformat(moment):%Y-%m-%d %H:%M}"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if value != round(value) else f"{value:.0f}"
    if isinstance(value, list):
        from reft_cli.spec.quoting import yaml_inline

        plain = value and all(isinstance(item, str | int | float) and str(item) == _cell(item) for item in value)
        return ", ".join(map(str, value)) if plain else yaml_inline(value)
    text = "" if value is None else str(value)
    return text if text == text.strip() and text.isprintable() else json.dumps(text, ensure_ascii=False)
