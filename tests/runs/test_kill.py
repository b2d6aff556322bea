"""SIGKILL at random moments: the run can always be gone on with, and ends bit for bit like the uninterrupted one."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from processes import PROCESSES
from reft_cli import runs
from reft_cli.errors import SpecError
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
ON_DISK = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink"}


def child(spec: Path, run: Path, *, resume: str | None, fatal: int, slow: float, events: object = None) -> None:
    """Train in a process of its own, and die before the `fatal`-th thing that it does on disk in the run's folder."""
    torch.set_num_threads(1)
    count = 0

    def on_event(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if name in ON_DISK and str(arguments[1 if name == "os.symlink" else 0]).startswith(str(run)):
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    class Slow(NullObserver):
        def on_step(self, record: StepRecord) -> None:
            time.sleep(slow)

    sys.addaudithook(on_event)
    runs.train(load_spec(spec, overrides=SETS), output=run, resume=resume, observer=Slow())
    if events is not None:
        events.send(count)


class Trial:
    """A run that is trained by one process after another."""

    def __init__(self, spec: Path, run: Path) -> None:
        self.spec, self.run = spec, run

    def start(self, *, fatal: int = -1, slow: float = 0.0, events: object = None) -> multiprocessing.Process:
        """A process that trains on, from wherever the one before was killed."""
        given = {"resume": "last" if RunFolder(self.run).exists() else None, "fatal": fatal, "slow": slow}
        process = PROCESSES.Process(target=child, args=(self.spec, self.run), kwargs=given | {"events": events})
        process.start()
        return process

    def finish(self, **given: object) -> bool:
        """Let a process train on; False if it was killed. Nothing else may end it."""
        process = self.start(**given)
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
        return process.exitcode == 0

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


@pytest.fixture(scope="module")
def whole(spec_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], int]:
    """The end of the uninterrupted run, and how often it touched the disk."""
    receiving, sending = PROCESSES.Pipe(duplex=False)
    made = Trial(spec_file, tmp_path_factory.mktemp("whole") / "run")
    assert made.finish(events=sending)
    end = made.end()
    assert end["record"]["step"] == STEPS and end["last"] == f"checkpoints/step_{STEPS:06d}"
    return end, receiving.recv()


def test_ten_kills_on_disk_change_nothing(trial: Callable[[str], Trial], whole: tuple[dict[str, object], int]):
    (end, events), draw = whole, random.Random(0)
    assert events > 150
    kills = done = 0
    while kills < 10:
        current = trial(str(done))
        while not current.finish(fatal=draw.randrange(1, events // 2) if kills < 10 else -1):
            kills += 1
        assert current.end() == end
        done += 1


def test_kills_at_any_time_change_nothing(trial: Callable[[str], Trial], whole: tuple[dict[str, object], int]):
    end, draw, current = whole[0], random.Random(1), trial("0")
    for _ in range(5):
        process = current.start(slow=0.02)
        time.sleep(draw.uniform(0.05, 0.5))
        process.kill()
        process.join(60)
    assert current.finish()
    assert current.end() == end


def test_a_second_process_is_refused_until_the_first_is_gone(
    trial: Callable[[str], Trial], whole: tuple[dict[str, object], int]
):
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
    assert current.finish()
    assert current.end() == whole[0]


@pytest.mark.slow
def test_a_kill_at_every_touch_of_the_disk(trial: Callable[[str], Trial], whole: tuple[dict[str, object], int]):
    end, events = whole
    for fatal in range(1, events + 1):
        current = trial(str(fatal))
        assert not current.finish(fatal=fatal)
        assert current.finish()
        assert current.end() == end
