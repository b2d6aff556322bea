"""The program `reft`: its commands, and the one place where an error becomes text and an exit code.

0 done · 1 bug · 2 usage or spec · 3 data · 4 model or checkpoint · 5 out of memory · 6 diverged ·
7 below --fail-under · 130 SIGINT · 137 a process was killed · 141 nobody reads stdout any more · 143 SIGTERM.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from reft_cli import __version__
from reft_cli.cli import check, console, doctor, eval, infer, init, options, runs, schema, tasks, train
from reft_cli.cli.habits import message_of
from reft_cli.environment import blotted, versions
from reft_cli.errors import MACHINE_FAULTS, MemoryExhausted, Problem, ProcessLost, ReftError, reason_of
from reft_cli.parallel import launch
from reft_cli.parallel.world import is_ours, world

# Typer exports only this one of the errors it makes itself; its grandparent is the class of them all.
TyperError: Any = typer.BadParameter.__mro__[2]
BROKEN_PIPE = 128 + 13

app = typer.Typer(
    name="reft",
    help="Finetune representations of frozen language models from one YAML file.",
    epilog="First steps: reft init > reft check spec.yaml > reft train spec.yaml > reft infer runs/spec --prompt '...'",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train", cls=train.TrainCommand)(train.train)
app.command("eval")(eval.evaluate)
app.command("infer")(infer.infer)
app.command("check")(check.check)
app.command()(init.init)
app.command()(schema.schema)
app.add_typer(tasks.app)
app.add_typer(runs.app)
app.command()(doctor.doctor)


def _version(given: bool) -> None:
    if given:
        console.result(f"reft {__version__}")
        raise typer.Exit


@app.callback()
def _globals(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Finetune representations of frozen language models from one YAML file."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the program on a command line and leave with its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    console.reset(words)
    if is_ours():
        launch.end_with_parent()
    sys.exit(_run(words))


def _run(words: list[str]) -> int:
    try:
        place = world()
        console.settings.speaks = place is None or place.rank == 0
        code = app(words, prog_name="reft", standalone_mode=False)
        sys.stdout.flush()
    except ReftError as error:
        return launch.LOST if isinstance(error, ProcessLost) and is_ours() else console.fail(error)
    except TyperError as error:
        return _usage(error)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:
        return _nobody_reads()
    except SystemExit as end:
        return _nobody_reads() if isinstance(end.__context__, BrokenPipeError) else int(end.code or 0)
    except OSError as error:
        return _machine_fault(error) if error.errno in MACHINE_FAULTS else _bug(error, words)
    except Exception as error:
        return _out_of_memory(error) if type(error).__name__ == "OutOfMemoryError" else _bug(error, words)
    return _interrupted() if code == 130 else code or 0


def _usage(error: Any) -> int:  # noqa: ANN401  Typer does not name the type
    message = message_of(error)
    if console.settings.json:
        console.fail_json({"code": error.exit_code, "kind": "usage", "message": message})
    else:
        console.complain(message)
    return int(error.exit_code)


def _interrupted() -> int:
    console.say("interrupted")
    return 130


def _nobody_reads() -> int:
    """Keep Python from complaining about stdout while it ends."""
    console.silence(sys.stdout)
    return BROKEN_PIPE


def _machine_fault(error: OSError) -> int:
    """A full disk and the like: neither the user's doing nor a fault of ours."""
    return console.fail(ReftError(f"{error.filename or 'reft'}: {reason_of(error)}"))


def _out_of_memory(error: Exception) -> int:
    """torch's error from a command that has no better advice of its own; torch need not be imported to know it."""
    hint = "Try a smaller --batch-size or --max-new-tokens, another --device, or a machine with more memory."
    return console.fail(MemoryExhausted(Problem(str(error).split(". ")[0], hint=hint)))


def _bug(error: Exception, words: list[str]) -> int:
    """A fault of ours: the traceback goes to a file, one line says where it is."""
    path = _write_report(error, words)
    message = f"internal error: {type(error).__name__}: {error}".splitlines()[0]
    if console.settings.json:
        console.fail_json({"code": 1, "kind": "bug", "message": message, "traceback": str(path)})
    else:
        console.complain(f"{message} (traceback: {path}). This is a bug in reft; please report it with that file.")
    if console.settings.verbose:
        traceback.print_exception(error)
    return 1


def _write_report(error: Exception, words: list[str]) -> Path:
    logs = console.settings.run / "logs" if console.settings.run and console.settings.run.is_dir() else None
    if logs:
        logs.mkdir(exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-")
    descriptor, name = tempfile.mkstemp(prefix=f"reft-error-{stamp}", suffix=".log", dir=logs)
    with open(descriptor, "w", encoding="utf-8") as file:
        made_with = ", ".join(f"{library} {version}" for library, version in versions().items())
        said = "".join(traceback.format_exception(error))
        file.write(blotted(f"{shlex.join(['reft', *words])}\n{made_with}\n\n{said}"))
    return Path(name)
