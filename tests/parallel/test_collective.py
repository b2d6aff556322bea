"""Two gloo processes add, agree, share out and fail together; a single one does nothing of it."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

from processes import environment, run_as
from reft_cli.errors import Interrupted, MemoryExhausted, Problem, ProcessLost, ReftError, SpecError
from reft_cli.parallel import collective
from reft_cli.parallel.world import World, is_launched, world


def everything() -> dict[str, Any]:
    """One of each call, in this process."""
    with collective.joined(device="cpu"):
        rank = collective.rank()
        tensors = [torch.full((2, 3), 1.0 + rank), torch.tensor(10.0 * (1 + rank))]
        collective.add_up(tensors)
        copies = [torch.full((4,), 5.0 + rank)]
        collective.copy_first(copies)
        words = ["a", "bbb", "cc", "dddd", "e"]
        shares: list[list[str]] = []

        def upper(mine: list[str]) -> list[str]:
            shares.append(mine)
            return [word.upper() for word in mine]

        return {
            "rank": rank,
            "size": collective.size(),
            "sums": [tensor.tolist() for tensor in tensors],
            "copies": copies[0].tolist(),
            "largest": collective.largest(rank + 3),
            "smallest": collective.smallest(rank + 3),
            "total": collective.total(0.5 + rank),
            "gathered": collective.gathered(f"of {rank}"),
            "from_first": collective.from_first(lambda: f"made by {rank}"),
            "spread": collective.spread(words, upper, cost=len),
            "share": shares[0],
            "shared": collective.share(words, cost=len),
        }


def test_two_processes():
    first, second = run_as(everything)
    assert (first["rank"], second["rank"]) == (0, 1)
    assert (first["share"], second["share"]) == (["dddd", "cc", "e"], ["bbb", "a"])
    for found in (first, second):
        assert found["shared"] == found.pop("share") and found.pop("shared")
        found.pop("rank")
    assert first == second
    assert first == {
        "size": 2,
        "sums": [[[3.0] * 3] * 2, 30.0],
        "copies": [5.0] * 4,
        "largest": 4,
        "smallest": 3,
        "total": 2.0,
        "gathered": ["of 0", "of 1"],
        "from_first": "made by 0",
        "spread": ["A", "BBB", "CC", "DDDD", "E"],
    }


def test_one_process():
    assert everything() == {
        "rank": 0,
        "size": 1,
        "sums": [[[1.0] * 3] * 2, 10.0],
        "copies": [5.0] * 4,
        "largest": 3,
        "smallest": 3,
        "total": 0.5,
        "gathered": ["of 0"],
        "from_first": "made by 0",
        "spread": ["A", "BBB", "CC", "DDDD", "E"],
        "share": ["a", "bbb", "cc", "dddd", "e"],
        "shared": ["a", "bbb", "cc", "dddd", "e"],
    }


FAILURES = [
    SpecError(Problem("is wrong", file="a.yaml", line=3, key="b", hint="put it right")),
    MemoryExhausted("too much"),
    Interrupted("stopped", signal=15),
    ProcessLost("gone", exit_code=137),
    torch.OutOfMemoryError("CUDA out of memory"),
    OSError(28, "No space left on device", "runs/x"),
]


def fail_in(failing: tuple[int, ...], error: BaseException) -> tuple[Any, ...]:
    with collective.joined(device="cpu"):
        try:
            with collective.together():
                if collective.rank() in failing:
                    raise error
            return ("fine",)
        except (ReftError, torch.OutOfMemoryError, OSError) as found:
            return (type(found), str(found), getattr(found, "problems", None), collective.largest(7))


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_what_fails_in_one_process_fails_in_all(error: BaseException):
    problems = getattr(error, "problems", None)
    assert run_as(fail_in, (1,), error) == [(type(error), str(error), problems, 7)] * 2


def test_what_fails_in_none_and_in_all():
    assert run_as(fail_in, (), FAILURES[0]) == [("fine",)] * 2
    assert run_as(fail_in, (0, 1), FAILURES[1]) == [(MemoryExhausted, "too much", (Problem("too much"),), 7)] * 2


def outlive() -> str:
    try:
        with collective.joined(device="cpu"):
            collective.largest(1)
            if collective.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            collective.add_up([torch.ones(3)])
    except ProcessLost as error:
        return str(error)
    return "nothing noticed"


def test_a_process_that_is_gone_is_noticed():
    found, gone = run_as(outlive)
    assert gone is None and found.startswith("another process of this run ended: ")


# ---- what the environment says


def test_this_process_alone():
    assert world() is None and not is_launched()
    with environment(ACCELERATE_MIXED_PRECISION="no"):
        assert world() is None and is_launched()


def test_what_launchers_say():
    with environment(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1"):
        assert world() == World(3, 4, 1) and is_launched()
    with environment(RANK="3", WORLD_SIZE="4"):
        assert world() == World(3, 4, None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2; ranks go from 0 to WORLD_SIZE - 1"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "the environment variable RANK is `x`, and has to be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "variable LOCAL_RANK is `-1`"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK and WORLD_SIZE are set and MASTER_ADDR and MASTER_PORT not"),
    ],
)
def test_what_cannot_be(given: dict[str, str], said: str):
    with environment(**given), pytest.raises(SpecError) as caught, collective.joined(device="cpu"):
        pass
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("local", "device", "said"),
    [
        ("2", "auto", "LOCAL_RANK is 2, and this machine has 2 CUDA devices: start fewer processes"),
        ("1", "cuda:1", "model.device: cuda:1 is one device, and 4 processes need one each; write cuda"),
    ],
)
def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch, local: str, device: str, said: str):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    places = environment(RANK="2", WORLD_SIZE="4", LOCAL_RANK=local, MASTER_ADDR="localhost", MASTER_PORT="1")
    with places, pytest.raises(SpecError) as caught, collective.joined(device=device):
        pass
    assert str(caught.value) == said
