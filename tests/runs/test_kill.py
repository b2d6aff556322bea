"""Kills, signals and full disks at random moments: the run goes on, and ends bit for bit like the uninterrupted one."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from processes import PROCESSES
from reft_cli import checkpoint, runs
from reft_cli.errors import MACHINE_FAULTS, ReftError, SpecError, exit_code
from reft_cli.runfolder import RunFolder
from reft_cli.spec.load import load_spec
from reft_cli.training.observer import NullObserver, StepRecord

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL and forkserver are POSIX's")

# Dropout makes the generators' states matter; a checkpoint every second step makes a third of the time writing.
SETS = (
    "train.epochs=4",
    "train.global_batch_size=4",
    "train.log_every=3",
    "intervention.dropout=0.2",
    "checkpoint.every=2",
    "evaluation.every=5",
)
STEPS = 20
KINDS = ("kill", "half", "full", "short", "late", "term")
ON_DISK = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink"}
GROWING = {"open", "os.mkdir", "os.symlink"}


@dataclass(frozen=True)
class Fault:
    """What happens to a process: `kind`, and when, counted in things done on disk, in saved files or in seconds.

    kill: SIGKILL before a touch of the disk. half: SIGKILL when half of a checkpoint's file is written. full: from a
    touch of the disk on, there is no room. short: files can be no longer than some kilobytes. late: SIGKILL at a time.
    term: SIGTERM at a time.
    """

    kind: str = "none"
    when: float = 0

    @property
    def ends(self) -> set[int]:
        """Exit codes that it may end a process with; 0 where training was over before it happened."""
        return {0, *{"term": {143, -signal.SIGTERM}, "full": {1}, "short": {1}}.get(self.kind, {-signal.SIGKILL})}


def child(spec: Path, run: Path, *, resume: str | None, fault: Fault, slow: float, events: object = None) -> None:
    """Train in a process of its own, to which something happens in the run's folder."""
    torch.set_num_threads(1)
    count = grown = 0

    def on_event(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal count, grown
        path = str(arguments[1 if name == "os.symlink" else 0]) if name in ON_DISK else ""
        if path.startswith(str(run)):
            count += 1
            if fault.kind == "kill" and count == fault.when:
                os.kill(os.getpid(), signal.SIGKILL)
            writes = name != "open" or bool(int(arguments[2]) & (os.O_WRONLY | os.O_RDWR))
            if name in GROWING and writes:
                grown = count
                if fault.kind == "full" and count >= fault.when:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    class Slow(NullObserver):
        def on_step(self, record: StepRecord) -> None:
            time.sleep(slow)

    if fault.kind == "half":
        checkpoint.write_synced = halved(int(fault.when))
    if fault.kind == "short":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.when), resource.RLIM_INFINITY))
    sys.addaudithook(on_event)
    try:
        runs.train(load_spec(spec, overrides=SETS), output=run, resume=resume, observer=Slow())
    except ReftError as error:
        print(f"{fault}: {error}", file=sys.stderr, flush=True)
        os._exit(exit_code(error))
    except OSError as error:
        os._exit(1 if error.errno in MACHINE_FAULTS else 99)
    if events is not None:
        events.send((count, grown))


def halved(call: int) -> Callable[[Path, bytes], None]:
    """write_synced that kills its process in the middle of a call."""
    inner, left = checkpoint.write_synced, [call]

    def write(path: Path, data: bytes) -> None:
        left[0] -= 1
        inner(path, data[: len(data) // 2] if left[0] == 0 else data)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return write


NONE = Fault()


class Trial:
    """A run that is trained by one process after another."""

    def __init__(self, spec: Path, run: Path) -> None:
        self.spec, self.run = spec, run

    def start(
        self, fault: Fault = NONE, *, slow: float = 0.0, events: object = None
    ) -> multiprocessing.process.BaseProcess:
        """A process that trains on, from wherever the one before was stopped."""
        given = {"resume": "last" if RunFolder(self.run).exists() else None, "fault": fault, "slow": slow}
        process = PROCESSES.Process(target=child, args=(self.spec, self.run), kwargs=given | {"events": events})
        process.start()
        return process

    def suffer(self, fault: Fault) -> bool:
        """Let a process train on until something happens to it; False if training was over before."""
        timed = fault.kind in ("late", "term")
        process = self.start(fault, slow=0.02 if timed else 0.0)
        if timed:
            time.sleep(fault.when)
            process.kill() if fault.kind == "late" else process.terminate()
        process.join(60)
        assert process.exitcode in fault.ends, (fault, process.exitcode)
        return process.exitcode != 0

    def finish(self, events: object = None) -> None:
        """Let a process train to the end."""
        process = self.start(events=events)
        process.join(60)
        assert process.exitcode == 0, process.exitcode

    def end(self) -> dict[str, object]:
        """What must be the same however often it was killed."""
        folder = RunFolder(self.run)
        lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
        kept = sorted(entry.name for entry in (self.run / "checkpoints").iterdir())
        record = folder.read()
        return {
            "interventions": (self.run / "last/interventions.safetensors").read_bytes(),
            "moments": (self.run / "last/training.safetensors").read_bytes(),
            "metrics": [{key: value for key, value in line.items() if key != "seconds"} for line in lines],
            "checkpoints": kept,
            "best": os.readlink(self.run / "best"),
            "last": os.readlink(self.run / "last"),
            "record": {key: record[key] for key in ("status", "exit_code", "step", "metrics", "trainable")},
            "files": sorted(entry.name for entry in self.run.iterdir()),
        }


@pytest.fixture
def trial(spec_file: Path, tmp_path: Path) -> Callable[[str], Trial]:
    return lambda name: Trial(spec_file, tmp_path / name)


@dataclass(frozen=True)
class Whole:
    """The end of the uninterrupted run, how often it touched the disk, and the last time that took room there."""

    end: dict[str, object]
    events: int
    growing: int


@pytest.fixture(scope="module")
def whole(spec_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    receiving, sending = PROCESSES.Pipe(duplex=False)
    made = Trial(spec_file, tmp_path_factory.mktemp("whole") / "run")
    made.finish(events=sending)
    end = made.end()
    assert end["record"]["step"] == STEPS and end["last"] == f"checkpoints/step_{STEPS:06d}"
    return Whole(end, *receiving.recv())


def drawn(kind: str, draw: random.Random, events: int) -> Fault:
    """A fault of a kind, at some moment of a run that touches the disk so often."""
    when = {
        "kill": lambda: draw.randrange(1, events // 2),
        "full": lambda: draw.randrange(1, events // 2),
        "half": lambda: draw.randrange(1, 20),
        "short": lambda: draw.choice((0, 1500, 6000)),
        "late": lambda: draw.uniform(0.05, 0.6),
        "term": lambda: draw.uniform(0.05, 0.6),
    }
    return Fault(kind, when[kind]())


def endure(make: Callable[[str], Trial], whole: Whole, *, faults: int, seed: int) -> None:
    """Runs that suffer some faults each, until there were so many; all end alike."""
    end, draw = whole.end, random.Random(seed)
    kinds, suffered, done = [], 0, 0
    while suffered < faults:
        current, seen = make(str(done)), set()
        for _ in range(draw.randint(1, 6)):
            kinds = kinds or draw.sample(KINDS, len(KINDS))
            seen.add(kinds[-1])
            suffered += current.suffer(drawn(kinds.pop(), draw, whole.events))
        current.finish()
        apart = {"checkpoints"} if "term" in seen else set()  # a signal saves at a step that is no even one, say
        assert {key: value for key, value in current.end().items() if key not in apart} == {
            key: value for key, value in end.items() if key not in apart
        }
        done += 1


def test_twelve_faults_change_nothing(trial: Callable[[str], Trial], whole: Whole):
    assert whole.events > 150
    endure(trial, whole, faults=12, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_fifty_faults_change_nothing(trial: Callable[[str], Trial], whole: Whole, seed: int):
    endure(trial, whole, faults=50, seed=seed)


def test_a_second_process_is_refused_until_the_first_is_gone(trial: Callable[[str], Trial], whole: Whole):
    current = trial("0")
    process = current.start(slow=0.5)
    deadline = time.monotonic() + 60
    while not current.run.joinpath("metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    spec = load_spec(current.spec, overrides=SETS)
    for flags in ({"resume": "last"}, {"overwrite": True}):
        with pytest.raises(SpecError, match=r"0 is being written by another process\. Wait for it, or give --name"):
            runs.train(spec, output=current.run, observer=NullObserver(), **flags)
    with pytest.raises(SpecError, match="0 exists and is unfinished"):
        runs.train(spec, output=current.run, observer=NullObserver())
    assert process.is_alive()
    process.kill()
    process.join(60)
    current.finish()
    assert current.end() == whole.end


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "full"])
def test_a_fault_at_every_touch_of_the_disk(trial: Callable[[str], Trial], whole: Whole, kind: str):
    for fatal in range(1, (whole.events if kind == "kill" else whole.growing) + 1):
        current = trial(str(fatal))
        assert current.suffer(Fault(kind, fatal))
        current.finish()
        assert current.end() == whole.end
