"""Runs whose rows share their template's head: they end like others, resume to the bit, and say why not."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reft_cli import runs
from reft_cli.data.examples import Example
from reft_cli.errors import Interrupted
from reft_cli.models.build import build_intervened
from reft_cli.models.intervened import IntervenedModel
from reft_cli.positions import Positions
from reft_cli.runs import execution
from reft_cli.runs.execution import Choice, choose_execution
from reft_cli.spec.load import LoadedSpec
from reft_cli.training.observer import NullObserver, StepRecord
from tiny_models import base_of

MakeSpec = Callable[..., LoadedSpec]
TEMPLATE = "data.template.prompt=Is this text good or bad? {text} ->"
ROWS = [Example([*range(20, 40), 50 + row, 7], 21, None, "", "", row) for row in range(9)]
NONE_IN_COMMON = "rows of a pass have no head of 16 tokens or more in common"


def intervened(dropout: float = 0.0, layers: str = "all", positions: str = "f2+l2") -> IntervenedModel:
    return build_intervened(
        base_of("llama"), method="loreft", layers=layers, component="block_output",
        positions=Positions.parse(positions), tied=True, rank=2, init="paper", dropout=dropout, dropout_on="delta",
        seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sets", "rows", "wanted"),
    [
        ((), ROWS, (True, None)),
        (("train.share_head=off",), ROWS, (False, None)),
        (("train.layout=padded",), ROWS, (False, "batches are padded")),
        (("train.micro_batch_size=1",), ROWS, (False, NONE_IN_COMMON)),
        ((), [*ROWS, Example([5, 6, 7], 2, None, "", "", 10)], (False, NONE_IN_COMMON)),
        ((), [replace(row, rejected=row) for row in ROWS], (False, "rows are pairs")),
        (("intervention.positions=l7",), ROWS, (True, None)),  # the prompts are equally long, and so edited alike
    ],
)
def test_heads_are_shared_where_it_is_exact_and_saves_work(
    make_spec: MakeSpec, sets: tuple[str, ...], rows: list[Example], wanted: tuple[bool, str | None]
):
    spec = make_spec(*sets).spec
    chosen = choose_execution(intervened(positions=spec.intervention.positions), spec, rows)
    assert chosen.shared == Choice(*wanted)


def test_what_else_keeps_rows_whole(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch):
    chosen = choose_execution(intervened(dropout=0.1), make_spec("intervention.dropout=0.1").spec, ROWS)
    assert chosen.shared.reason == "dropout is drawn for every row by itself"
    cached = make_spec("train.cache_frozen=on", "intervention.layers=2").spec
    chosen = choose_execution(intervened(layers="2"), cached, ROWS)
    assert chosen.shared.reason == "the frozen cache keeps whole rows"
    monkeypatch.setattr(execution, "why_not_shared", lambda _: "its layers look at a whole row")
    assert choose_execution(intervened(), make_spec().spec, ROWS).shared.reason == "its layers look at a whole row"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last" / "interventions.safetensors")


@pytest.mark.parametrize("rows", ["auto", "3"])
def test_a_run_that_shares_heads_ends_like_one_that_does_not(make_spec: MakeSpec, tmp_path: Path, rows: str):
    done = {}
    for wanted in ("auto", "off"):
        spec = make_spec(TEMPLATE, f"train.micro_batch_size={rows}", f"train.share_head={wanted}")
        done[wanted] = runs.train(spec, output=tmp_path / wanted, observer=NullObserver()).run
        assert json.loads((done[wanted] / "run.json").read_text())["shared"] is (wanted == "auto")
    torch.testing.assert_close(weights(done["auto"]), weights(done["off"]), rtol=1e-4, atol=2e-5)


class Stopping(NullObserver):
    """Sends itself a signal after two steps."""

    def on_step(self, record: StepRecord) -> None:
        if record.step == 2:
            signal.raise_signal(signal.SIGTERM)


def test_a_run_that_shares_heads_resumes_to_the_bit(make_spec: MakeSpec, tmp_path: Path):
    spec = make_spec(TEMPLATE, "train.micro_batch_size=3")
    whole = runs.train(spec, output=tmp_path / "whole", observer=NullObserver())
    with pytest.raises(Interrupted):
        runs.train(spec, output=tmp_path / "cut", observer=Stopping())
    resumed = runs.train(spec, output=tmp_path / "cut", resume="last", observer=NullObserver())
    torch.testing.assert_close(weights(resumed.run), weights(whole.run), rtol=0, atol=0)


def test_check_says_whether_heads_are_shared_and_counts_them_once(make_spec: MakeSpec):
    found = {way: runs.check(make_spec(TEMPLATE, f"train.share_head={way}")).model for way in ("auto", "off")}
    shared, whole = found["auto"], found["off"]
    assert shared is not None and whole is not None
    assert shared.execution.shared.taken and not whole.execution.shared.taken
    less = shared.estimate.operations / whole.estimate.operations
    assert 0.2 < less < 0.8, less
    assert shared.estimate.tokens == whole.estimate.tokens
    assert shared.estimate.memory_bytes == whole.estimate.memory_bytes  # the next rows may share no head
