"""The tokens of a pass: halved until the longest rows fit, the same in every process, with the global batch kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from processes import run_as
from reft_cli import runs
from reft_cli.data.examples import Example, Examples
from reft_cli.errors import MemoryExhausted
from reft_cli.parallel.collective import joined, rank
from reft_cli.spec.load import LoadedSpec
from reft_cli.training import budget
from reft_cli.training.budget import fitting_budget, heaviest, is_out_of_memory, tokens_in
from reft_cli.training.observer import NullObserver


def rows(*lengths: int) -> list[Example]:
    """Rows of so many tokens."""
    fields = {"row": 0, "prompt": "", "completion": "", "label": None}
    return [
        Example(**fields | {"row": row, "input_ids": [1] * length, "prompt_length": 1, "token_types": None})
        for row, length in enumerate(lengths)
    ]


def full_above(limit: int, *, padded: bool, tried: list[int]) -> Callable[[Examples], None]:
    """A device that holds so many tokens."""

    def attempt(batch: Examples) -> None:
        tried.append(tokens_in(batch, padded=padded))
        if tried[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 4 GiB")

    return attempt


EIGHT = rows(100, 90, 80, 70, 60, 50, 40, 30)


@pytest.mark.parametrize(
    ("first", "limit", "padded", "found", "tried"),
    [
        (4096, 9999, False, 4096, [520]),
        (4096, 400, False, 190, [520, 190]),
        (4096, 189, False, 100, [520, 190, 100]),
        (4096, 400, True, 400, [800, 400]),
        (200, 100, False, 100, [190, 100]),
        (200, 400, False, 190, [190]),
    ],
)
def test_it_is_halved_until_the_longest_rows_fit(first: int, limit: int, padded: bool, found: int, tried: list[int]):
    seen: list[int] = []
    attempt = full_above(limit, padded=padded, tried=seen)
    assert fitting_budget(first, examples=EIGHT, global_batch_size=8, padded=padded, attempt=attempt) == found
    assert seen == tried


def test_no_more_rows_are_tried_than_a_global_batch_has():
    assert len(heaviest(EIGHT, rows=3, token_budget=4096, padded=False)) == 3


def test_a_row_that_does_not_fit_by_itself_is_the_end():
    attempt = full_above(99, padded=False, tried=[])
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fitting_budget(4096, examples=EIGHT, global_batch_size=8, padded=False, attempt=attempt)
    assert str(caught.value).startswith(
        "with one row of 100 tokens at a time: CUDA out of memory. Tried to allocate 2.00"
    )


def test_other_errors_are_not_swallowed():
    def attempt(batch: Examples) -> None:
        raise RuntimeError("device-side assert triggered")

    with pytest.raises(RuntimeError, match=r"^device-side assert triggered$"):
        fitting_budget(4096, examples=EIGHT, global_batch_size=8, padded=False, attempt=attempt)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("another process's device is full"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_a_device_is_full(error: BaseException, full: bool):
    assert is_out_of_memory(error) == full


def find_on_uneven_devices() -> int | str:
    """The second process has half the memory; of 5 rows either has 3 at most."""
    with joined(device="cpu"):
        attempt = full_above(300 // (1 + rank()), padded=False, tried=[])
        found = fitting_budget(4096, examples=EIGHT, global_batch_size=16, padded=False, attempt=attempt)
        try:
            attempt = full_above(9999 if rank() == 0 else 1, padded=False, tried=[])
            fitting_budget(4096, examples=EIGHT, global_batch_size=16, padded=False, attempt=attempt)
        except torch.OutOfMemoryError as error:
            share = len(heaviest(EIGHT, rows=5, token_budget=4096, padded=False))
            return f"{share}; {found}; {str(error).split('. ')[0]}"
        return found


def test_all_processes_take_what_the_smallest_device_holds():
    first, second = run_as(find_on_uneven_devices)
    assert first == "3; 100; with one row of 100 tokens at a time: another process's device is full"
    assert second == "3; 100; with one row of 100 tokens at a time: CUDA out of memory"


# ---- in a run


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Makes the CPU a device that holds so many tokens and says when it is full; gives the passes that went through."""

    def hold(limit: int) -> list[int]:
        passes: list[int] = []
        from reft_cli.training.passes import PlainPasses

        inner = PlainPasses.__call__

        def call(self, batch, units):
            tokens = batch.inputs["input_ids"].numel()
            if tokens > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 4 GiB")
            passes.append(tokens)
            return inner(self, batch, units)

        monkeypatch.setattr(PlainPasses, "__call__", call)
        monkeypatch.setattr(budget, "PROBED", ("cpu",))
        return passes

    return hold


def train(spec: LoadedSpec, run: Path, **given) -> dict:
    runs.train(spec, output=run, observer=given.pop("observer", NullObserver()), **given)
    return json.loads((run / "run.json").read_text())


def test_a_run_finds_its_passes_and_keeps_its_numbers(make_spec, tmp_path: Path, observer, small_device):
    spec = make_spec("intervention.dropout=0.0", "checkpoint.keep=9")
    train(spec, tmp_path / "wide")
    passes = small_device(100)
    record = train(spec, tmp_path / "narrow", observer=observer)
    assert record["token_budget"] <= 100 and max(passes) <= 100
    assert any("too many for this device" in message for message in observer.messages)
    torch.testing.assert_close(*(_losses(tmp_path / name) for name in ("narrow", "wide")), rtol=1e-4, atol=1e-5)
    before = len(passes)
    again = train(spec, tmp_path / "narrow", resume="3")
    assert again["token_budget"] == record["token_budget"]
    assert len(passes) - before == before // 2 + 1  # one probe, on half the steps


def _losses(run: Path) -> list[float]:
    return [json.loads(line).get("loss", 0.0) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_probe_leaves_no_trace(make_spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = make_spec("intervention.dropout=0.3")
    train(spec, tmp_path / "plain")
    monkeypatch.setattr(budget, "PROBED", ("cpu",))
    train(spec, tmp_path / "probed")
    for name in ("interventions.safetensors", "training.safetensors"):
        assert (tmp_path / "probed/last" / name).read_bytes() == (tmp_path / "plain/last" / name).read_bytes()


def test_what_is_said_when_one_row_is_too_much(make_spec, tmp_path: Path, small_device):
    small_device(5)
    with pytest.raises(MemoryExhausted) as caught:
        train(make_spec(), tmp_path / "run")
    longest = str(caught.value).split(" tokens")[0].split()[-1]
    assert int(longest) > 5
    assert str(caught.value) == (
        f"CUDA out of memory with one row of {longest} tokens at a time; 2.00 GiB more were needed.\n"
        "  Try, in order: train.gradient_checkpointing: true; model.quantization: nf4; data.max_length: 256. The last "
        "two change the result."
    )
    assert json.loads((tmp_path / "run/run.json").read_text())["exit_code"] == 5


def test_a_given_size_is_not_probed(make_spec, tmp_path: Path, small_device):
    small_device(5)
    with pytest.raises(MemoryExhausted, match=r"CUDA out of memory; 2\.00 GiB more were needed"):
        train(make_spec("train.micro_batch_size=8"), tmp_path / "run")
