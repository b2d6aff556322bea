"""`reft eval`: scores of a run on a split, as a table or as JSON; `--fail-under` makes them a gate."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from reft_cli.cli import console, options
from reft_cli.cli.importing import importing
from reft_cli.cli.processes import as_several
from reft_cli.cli.progress import duration, progress
from reft_cli.errors import BelowThreshold, SpecError
from reft_cli.evaluation.metrics import LOWER_IS_BETTER

if TYPE_CHECKING:
    from reft_cli.runs import EvalReport
    from reft_cli.runs.results import Base

EXCLUDED = {  # by --tasks
    "--data": "a task brings its own rows; give one of them",
    "--split": "a task brings its own rows; give one of them",
    "--compile": "tasks are read more than written; leave --compile out",
    "--set": "a task says itself how its answers are decoded; leave --set out",
    "--loss": "a task has its own scores; leave --loss out",
}


def evaluate(
    run: options.RunPath,
    data: Annotated[
        str | None, typer.Option("--data", help="A file, folder, hub id or bundled:NAME/SPLIT.", metavar="DATA")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Split of the run's own data, or of --data: test if not given.")
    ] = None,
    tasks: options.Tasks = None,
    task_folder: options.TaskFolder = None,
    few_shot: options.FewShot = None,
    chat: options.ChatTemplate = False,
    checkpoint: options.Checkpoint = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = None,
    sets: options.DecodingSets = [],  # noqa: B006  Typer reads the default and never hands it out
    compile: options.Compile = None,
    compare_base: Annotated[bool, typer.Option("--compare-base", help="Score the base model too.")] = False,
    base: Annotated[bool, typer.Option("--base", help="Score the base model only.")] = False,
    loss: Annotated[bool, typer.Option("--loss", help="Read the loss too where answers are generated.")] = False,
    fail_under: options.FailUnder = [],  # noqa: B006  Typer reads the default and never hands it out
    processes: options.Processes = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    model: options.BaseModel = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Score a run on a split, or on tasks of lm-evaluation-harness."""
    gates = [_gate(text, of_tasks=tasks is not None) for text in fail_under]
    decoding = _decoding(sets, compile=compile)
    excluded = {"--data": data, "--split": split, "--compile": compile, "--set": sets, "--loss": loss}
    needing = {"--task-folder": task_folder, "--few-shot": few_shot, "--chat": chat or None}
    names = _names(tasks, excluded=excluded, needing=needing)
    which = _which(base=base, compare=compare_base)
    _share_out(processes, device=device, device_map=device_map, tasks=tasks)
    with importing():
        from reft_cli import runs

    score = (
        partial(runs.evaluate, data=data, split=split or "test", loss=loss, generation=decoding)
        if names is None
        else partial(runs.evaluate_tasks, tasks=names, folder=task_folder, few_shot=few_shot, chat=chat)
    )
    place = runs.BasePlace(
        model=model, device=device or "auto", device_map=device_map, trust_remote_code=trust_remote_code
    )
    with progress() as observer:
        report = score(
            run, checkpoint=checkpoint, limit=limit, batch_size=batch_size, base=which, place=place, observer=observer
        )
    if as_json:
        console.result_json(report.to_dict())
    else:
        _print(report)
    hold(report.metrics or report.base_metrics, gates)


def _which(*, base: bool, compare: bool) -> Base:
    if base and compare:
        raise SpecError("--base scores the base only and --compare-base both; give one of them")
    return "only" if base else "compare" if compare else "none"


def _decoding(sets: list[str], *, compile: str | None) -> dict[str, Any]:
    """What the flags change of the run's own `generation`."""
    from reft_cli.spec.decoding import generation_keys

    return generation_keys(sets) | ({} if compile is None else {"compile": compile})


def _share_out(processes: int | None, *, device: str | None, device_map: str | None, tasks: str | None) -> None:
    """Go on in each of several processes; the one that started them ends with their code."""
    if (processes or 1) > 1 and tasks is not None:
        raise SpecError("--processes: tasks of lm-evaluation-harness run in one process; leave it out")
    if (processes or 1) > 1 and device_map is not None:
        raise SpecError("--device-map: one process takes all devices; leave out --processes")
    alone = tasks is not None or device_map is not None
    outcome = as_several(processes or (1 if alone else "auto"), device=device or "auto")
    if outcome is not None:
        raise SystemExit(outcome.code)


def _names(tasks: str | None, *, excluded: Mapping[str, object], needing: Mapping[str, object]) -> list[str] | None:
    """The tasks of a list with commas. SpecError: a flag is given that tasks exclude, or one that needs them."""
    if tasks is None:
        for flag, given in needing.items():
            if given is not None:
                raise SpecError(f"{flag} belongs to --tasks; the run's own data are scored as they were trained")
        return None
    for flag, given in excluded.items():
        if given:
            raise SpecError(f"{flag} and --tasks: {EXCLUDED[flag]}")
    names = [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise SpecError(f"--tasks {tasks}: write names with commas between them, for example arc_easy,hellaswag")
    return names


def _print(report: EvalReport) -> None:
    columns = {"base": report.base_metrics, "run": report.metrics}
    shown = {name: scores for name, scores in columns.items() if scores}
    metrics = list(dict.fromkeys(metric for scores in shown.values() for metric in scores))
    rows = [[metric, *(f"{scores[metric]:.4f}" for scores in shown.values())] for metric in metrics]
    if len(shown) == 2:
        for row, metric in zip(rows, metrics, strict=True):
            row.append(f"{report.metrics[metric] - report.base_metrics[metric]:+.4f}")
    headers = ["metric", *shown, *(["difference"] if len(shown) == 2 else [])]
    console.result_table(headers, rows, right=headers[1:])
    console.say(f"{report.rows:,} rows of {report.data} in {duration(report.seconds)}, checkpoint {report.checkpoint}")
    if report.path:
        console.say(f"kept in {report.path}")


def _gate(text: str, *, of_tasks: bool) -> tuple[str, float]:
    """`accuracy=0.6` as ("accuracy", 0.6). SpecError before anything is scored; tasks alone have other scores."""
    from reft_cli.spec.task import Metric

    name, _, number = text.partition("=")
    try:
        least = float(number)
    except ValueError:
        raise SpecError(f"--fail-under {text}: write METRIC=NUMBER, for example accuracy=0.6") from None
    known = get_args(Metric)
    if not of_tasks and name.partition("/")[0] not in known:
        near = get_close_matches(name, known, 1, 0.5)
        raise SpecError(
            f"--fail-under {text}: no such score; there are {', '.join(known)}"
            + (f"; did you mean `{near[0]}`?" if near else "")
        )
    if name in LOWER_IS_BETTER:
        raise SpecError(f"--fail-under {text}: a low {name} is a good one; use a score that grows")
    return name, least


def hold(scores: dict[str, float], gates: list[tuple[str, float]]) -> None:
    """BelowThreshold with every score that is below its gate; SpecError if there is no such score."""
    unknown = [name for name, _ in gates if name not in scores]
    if unknown:
        raise SpecError(f"--fail-under {unknown[0]}: no such score; there are {', '.join(scores)}")
    below = [f"{name} is {scores[name]:.4f}, below {least:g}" for name, least in gates if not scores[name] >= least]
    if below:
        raise BelowThreshold(*below)
