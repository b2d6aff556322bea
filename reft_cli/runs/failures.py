"""Runs that do not finish: what ended one is written into run.json, and what is no fault of ours becomes advice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from reft_cli.errors import (
    MACHINE_FAULTS,
    CheckpointError,
    Interrupted,
    MemoryExhausted,
    ModelError,
    ProcessLost,
    ReftError,
    exit_code,
    first_line,
    reason_of,
)
from reft_cli.parallel.collective import is_first
from reft_cli.runfolder import RunFolder, Status
from reft_cli.spec.schema import Spec
from reft_cli.training.budget import is_out_of_memory
from reft_cli.training.observer import Observer

GPU_LOST = ("uncorrectable ECC", "busy or unavailable", "no CUDA-capable device", "hardware stack", "GPU is lost")


@contextmanager
def failures_noted(run: RunFolder, spec: Spec, observer: Observer) -> Iterator[None]:
    """Inside, whatever ends the run is written into run.json; running out of memory or of disk becomes advice.

    A run whose processes lost each other is left as one that was killed; whoever started them knows why.
    """

    def note(status: Status, code: int, reason: str) -> None:
        if not is_first():
            return
        with suppress(OSError, CheckpointError):  # the disk may be what failed, or the folder be gone
            run.finish(status, exit_code=code, reason=reason)
        run.release()
        observer.on_end(status)

    try:
        yield
    except ProcessLost:
        run.release()
        raise
    except ReftError as error:
        note("interrupted" if isinstance(error, Interrupted) else "failed", exit_code(error), str(error))
        raise
    except BaseException as error:
        advice = _advice(run, spec, error)
        note("failed", 1 if advice is None else advice.code, str(advice or f"{type(error).__name__}: {error}"))
        if advice is not None:
            raise advice from error
        raise


def _advice(run: RunFolder, spec: Spec, error: BaseException) -> ReftError | None:
    """What to say instead of an error that is no fault of ours; None if it is one."""
    if is_out_of_memory(error):
        return _memory_advice(spec, error)
    if isinstance(error, RuntimeError) and any(words in str(error) for words in GPU_LOST):
        return ReftError(f"the GPU failed: {first_line(error)}. Put that right and go on with --resume.")
    if type(error).__module__ == "torch._dynamo.exc":
        return ModelError(f"train.compile: on is not possible for this model: {first_line(error)}; write auto or off")
    if not isinstance(error, OSError):
        return None
    file = Path(error.filename) if isinstance(error.filename, str) else run.path
    if error.errno not in MACHINE_FAULTS and not file.absolute().is_relative_to(run.path.absolute()):
        return None
    return ReftError(f"{file}: {reason_of(error)}. Put that right and go on with --resume.")


def _memory_advice(spec: Spec, error: BaseException) -> MemoryExhausted:
    """What was full, and what to change, in the order of what it costs; after the probe, smaller passes are no help."""
    train, text = spec.train, str(error)
    probed = re.match(r"with one row of [\d,]+ tokens at a time", text)
    needed = re.search(r"Tried to allocate ([\d.]+ [KMG]iB)", text)
    first = f"CUDA out of memory {probed[0]}" if probed else text.split(". ")[0]
    ways = ["train.gradient_checkpointing: true"] if not train.gradient_checkpointing else []
    if not probed and train.micro_batch_size != 1:
        smaller = 1 if train.micro_batch_size == "auto" else max(1, train.micro_batch_size // 2)
        ways.insert(0, f"train.micro_batch_size: {smaller}")
    spread = spec.parallel.shard or spec.model.device_map is not None
    changing = ["model.quantization: nf4"] if spec.model.quantization is None and not spread else []
    changing.append(f"data.max_length: {spec.data.max_length // 2}")
    last = "last two change" if len(changing) == 2 else "last changes"
    more = f"; {needed[1]} more were needed" if needed else ""
    return MemoryExhausted(f"{first}{more}.\n  Try, in order: {'; '.join(ways + changing)}. The {last} the result.")
