"""`reft train`: from a spec to a run folder. The folder's path is the only line on stdout."""

from __future__ import annotations

import re
import shlex
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from reft_cli.cli import console, options
from reft_cli.cli.beside import looking_beside
from reft_cli.cli.fetching import tell_of_fetching
from reft_cli.cli.importing import importing
from reft_cli.cli.processes import as_several
from reft_cli.cli.progress import progress
from reft_cli.errors import Interrupted, SpecError

if TYPE_CHECKING:
    from reft_cli.runs import TrainResult
    from reft_cli.spec.load import LoadedSpec

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class TrainCommand(TyperCommand):
    """Lets `--resume` stand alone, which Typer's options cannot: without a step after it, it means the last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401  Typer does not export the type
        """Fill in what `--resume` means, then parse as usual."""
        return super().parse_args(ctx, with_step(args))


def with_step(words: list[str]) -> list[str]:
    """`--resume` without a step as `--resume=last`, `--resume 300` as `--resume=300`."""
    full: list[str] = []
    for word in words:
        if full and full[-1] == "--resume=last" and (word.isdecimal() or word == "last"):
            full[-1] = f"--resume={word}"
        else:
            full.append("--resume=last" if word == "--resume" else word)
    return full


def train(
    spec: options.SpecFile,
    sets: options.Sets = [],  # noqa: B006  Typer reads the default and never hands it out
    name: Annotated[str | None, typer.Option("--name", help="Name of the run; the folder is runs/NAME.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The run folder, in place of runs/NAME.", metavar="FOLDER")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", help="Go on from the last checkpoint, or from a step.", metavar="[STEP]"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run that is there and start over.")
    ] = False,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="Stop after so many optimizer steps.", min=1, metavar="N")
    ] = None,
    processes: Annotated[
        str | None, typer.Option("--processes", help="How many, one a GPU; auto: all GPUs.", metavar="N")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the spec with every key filled, and stop.")] = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Train an intervention and print its run folder."""
    from reft_cli.spec import load_spec, resolved_yaml

    if resume and overwrite:
        raise SpecError("--resume goes on with a run and --overwrite deletes it; give one of them")
    if resume and resume != "last" and not resume.isdecimal():
        raise SpecError(f"--resume {resume}: a step or nothing is needed")
    if name is not None and not NAME.fullmatch(name):
        raise SpecError(f"--name {name}: only letters, digits, ., _ and - make a name; for a path there is --output")
    sets = [*sets, *([f"parallel.processes={processes}"] if processes else [])]
    loaded = load_spec(spec, overrides=[*sets, *([f"train.max_steps={max_steps}"] if max_steps else [])])
    if dry_run:
        text = resolved_yaml(loaded)
        console.result_json({"resolved": text}) if as_json else console.result(text.rstrip("\n"))
        return
    _ignore_early_usr1()
    console.settings.run = loaded.run_path(output=output, name=name)
    code = _as_several(console.settings.run, loaded, resume=resume is not None, overwrite=overwrite)
    if code is not None:
        raise SystemExit(code)  # typer.Exit(130) would be taken for a Ctrl-C here
    with importing():
        from reft_cli import runs

    tell_of_fetching(loaded.spec.model)
    try:
        with looking_beside(spec), progress() as observer:
            done = runs.train(loaded, output=output, name=name, resume=resume, overwrite=overwrite, observer=observer)
    except Interrupted as stopped:
        words = resume_command(spec, sets, name=name, output=output, max_steps=max_steps)
        stopped.problems = (replace(stopped.problems[0], hint=f"Go on with: {words}"),)
        raise
    _print(done, as_json=as_json)


def _ignore_early_usr1() -> None:
    """There is nothing to save before training begins, and the signal's default would end the process."""
    if hasattr(signal, "SIGUSR1") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _as_several(folder: Path, loaded: LoadedSpec, *, resume: bool, overwrite: bool) -> int | None:
    """The exit code of a run in processes of its own, noted in run.json if they could not; None: it is to run here."""
    from reft_cli.runfolder import RunFolder

    run, spec = RunFolder(folder), loaded.spec
    outcome = as_several(
        spec.parallel.processes if spec.model.device_map is None else 1,
        device=spec.model.device,
        before=lambda: run.check(resume=resume, overwrite=overwrite),
    )
    if outcome is None:
        return None
    if outcome.code and run.exists() and run.read().get("status") == "running":
        run.finish("failed", exit_code=outcome.code, reason=outcome.lost or outcome.said or "ended by a signal")
    return outcome.code


def _print(done: TrainResult, *, as_json: bool) -> None:
    if as_json:
        best = str(done.best) if done.best else None
        facts = {"run": str(done.run), "step": done.step, "metrics": done.metrics, "best": best, "reason": done.reason}
        console.result_json(facts)
    else:
        console.result(str(done.run))
    scores = ", ".join(f"{key} {value:.4g}" for key, value in done.metrics.items())
    why = "stopped early (checkpoint.patience)" if done.reason == "patience" else done.reason
    console.say(f"{why} at step {done.step}: {scores}")
    run = shlex.quote(str(done.run))
    console.say(f"next: reft eval {run}, or reft infer {run} --prompt '...'")


def resume_command(spec: Path, sets: list[str], *, name: str | None, output: Path | None, max_steps: int | None) -> str:
    """The command that goes on with this run."""
    words = ["reft", "train", str(spec), *(part for each in sets for part in ("--set", each))]
    for flag, value in (("--name", name), ("--output", output), ("--max-steps", max_steps)):
        words += [flag, str(value)] if value is not None else []
    return shlex.join([*words, "--resume"])
