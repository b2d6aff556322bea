"""How a run is carried out is chosen by what is possible and pays, and each choice has its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers

from reft_cli import runs
from reft_cli.data.encode import Example
from reft_cli.errors import ModelError
from reft_cli.models import compiling
from reft_cli.models.build import build_intervened
from reft_cli.models.float8 import Float8Linear
from reft_cli.models.intervened import IntervenedModel
from reft_cli.positions import Positions
from reft_cli.runfolder import RunFolder
from reft_cli.runs import execution
from reft_cli.runs.execution import Choice, choose_execution
from reft_cli.spec.load import LoadedSpec
from reft_cli.tasks.objectives import Task
from reft_cli.training import loop
from reft_cli.training.passes import PlainPasses, why_not_recorded
from tiny_models import base_of, config_of

MakeSpec = Callable[..., LoadedSpec]
ROWS = [Example([5, 6, 7], 2, None, "", "", row) for row in range(4)]


@pytest.fixture
def model():
    return build_intervened(
        base_of("llama"), method="loreft", layers="all", component="block_output", positions=Positions.parse("f2+l2"),
        tied=True, rank=2, init="paper", dropout=0.0, dropout_on="delta", seed=0,
    )  # fmt: skip


def test_a_cpu_packs_and_says_why_it_does_no_more(model, make_spec: MakeSpec):
    chosen = choose_execution(model, make_spec().spec, ROWS)
    assert (chosen.layout, chosen.compiled.taken, chosen.recorded.taken) == ("packed", False, False)
    assert chosen.packed.reason is None
    assert chosen.compiled.reason == "it pays on a GPU only; train.compile: on does it here"
    assert chosen.recorded.reason == "there are no CUDA graphs on cpu"


def test_a_choice_and_its_reason_are_two_keys_of_a_run_json(model, make_spec: MakeSpec):
    """Runs that were written before are read by these keys."""
    assert choose_execution(model, make_spec("train.cuda_graphs=off", "train.share_head=off").spec, ROWS).to_dict() == {
        "layout": "packed",
        "layout_reason": None,
        "compiled": False,
        "compile_reason": "it pays on a GPU only; train.compile: on does it here",
        "recorded": False,
        "record_reason": None,
        "cached": False,
        "cache_reason": "only 1 of 3 blocks lie below the lowest edit",
        "shared": False,
        "share_reason": None,
    }


def test_an_encoder_is_not_taught_to_write(model, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch):
    """It read the answers that it was to predict: training went well and answers were noise."""
    monkeypatch.setattr(model, "base_model", transformers.BertLMHeadModel(config_of("bert")).eval())
    with pytest.raises(ModelError, match=r"its tokens see those after them, as an encoder's do, so it cannot learn"):
        choose_execution(model, make_spec().spec, ROWS)


def test_what_was_asked_for_has_no_reason(model, make_spec: MakeSpec):
    spec = make_spec("train.compile=off", "train.cuda_graphs=off", "train.layout=padded").spec
    chosen = choose_execution(model, spec, ROWS)
    assert not chosen.compiled.taken and not chosen.recorded.taken and chosen.layout == "padded"
    assert (chosen.packed.reason, chosen.compiled.reason, chosen.recorded.reason) == (None, None, None)


def test_compiling_needs_a_compiler(model, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch):
    assert choose_execution(model, make_spec("train.compile=on").spec, ROWS).compiled.taken
    monkeypatch.setattr(compiling, "COMPILERS", ("no-such-compiler",))
    with pytest.raises(ModelError, match=r"train\.compile: on is not possible: there is no C compiler on the path"):
        choose_execution(model, make_spec("train.compile=on").spec, ROWS)
    assert choose_execution(model, make_spec().spec, ROWS).compiled.reason == "there is no C compiler on the path"


def test_short_runs_are_not_compiled(model, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(compiling, "has_triton", lambda: True)
    short = choose_execution(model, make_spec("train.cuda_graphs=off").spec, ROWS)
    assert not short.compiled.taken and short.compiled.reason.startswith("the run is too short")
    monkeypatch.setattr(execution, "WORTH_COMPILING", -1)
    assert choose_execution(model, make_spec("train.cuda_graphs=off").spec, ROWS).compiled.taken
    eight_bits = choose_execution(model, make_spec("train.cuda_graphs=off", "model.quantization=int8").spec, ROWS)
    assert not eight_bits.compiled.taken and eight_bits.compiled.reason == "an 8-bit base takes as long compiled"


def test_what_cannot_be_recorded_is_said(model):
    given = {"packed": True, "checkpointing": False, "dropout": False}
    assert why_not_recorded(model, **given) == "there are no CUDA graphs on cpu"


@pytest.mark.slow
def test_a_compiled_run_ends_like_the_plain_one(
    make_spec: MakeSpec, tmp_path: Path, observer, monkeypatch: pytest.MonkeyPatch
):
    """Through torch's own interpreter: what is traced and cut is tested here, generated code on GPUs."""
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda made, **_: compile_with(made, backend="aot_eager", dynamic=True))
    found = {}
    for wanted in ("off", "on"):
        runs.train(make_spec(f"train.compile={wanted}"), output=tmp_path / wanted, observer=observer)
        found[wanted] = [record.loss for record in observer.steps]
        observer.steps.clear()
    torch.testing.assert_close(found["on"], found["off"], rtol=1e-5, atol=1e-6)


def test_a_float8_run_learns_and_is_answered_on_the_same_base(make_spec: MakeSpec, tmp_path: Path, observer):
    runs.train(make_spec("model.quantization=float8", "train.epochs=4"), output=tmp_path / "run", observer=observer)
    found = [record.loss for record in observer.steps]
    assert found[-1] < found[0]
    with runs.open_run(tmp_path / "run") as session:
        layer = session.model.base_model.model.layers[0].mlp.up_proj
        assert isinstance(layer, Float8Linear)


def test_a_run_with_the_cache_ends_like_one_without(make_spec: MakeSpec, tmp_path: Path, observer):
    found = {}
    for wanted in ("off", "on"):
        sets = ("intervention.layers=1;2", f"train.cache_frozen={wanted}")
        runs.train(make_spec(*sets), output=tmp_path / wanted, observer=observer)
        found[wanted] = [record.loss for record in observer.steps]
        observer.steps.clear()
    torch.testing.assert_close(found["on"], found["off"], rtol=1e-5, atol=1e-6)


def test_a_cache_that_cannot_be_is_refused(make_spec: MakeSpec, tmp_path: Path, observer):
    with pytest.raises(ModelError, match=r"train\.cache_frozen: on is not possible: only 1 of 3 blocks"):
        runs.train(make_spec("train.cache_frozen=on"), output=tmp_path / "run", observer=observer)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wanted", ["on", "auto"])
def test_a_model_that_cannot_be_compiled_is_refused_or_runs_as_it_stands(
    make_spec: MakeSpec, tmp_path: Path, observer, monkeypatch: pytest.MonkeyPatch, wanted: str
):
    def broken(*_: object) -> None:
        raise NotImplementedError("no such operator")

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda made, **_: compile_with(made, backend=broken, dynamic=True))
    monkeypatch.setattr(execution, "_choose_compiling", lambda *_: Choice(True))
    spec = make_spec(f"train.compile={wanted}", "evaluation.every=never", "train.max_steps=1")
    if wanted == "on":
        with pytest.raises(
            ModelError, match=r"train\.compile: on is not possible for this model: .*; write auto or off"
        ):
            runs.train(spec, output=tmp_path / "run", observer=observer)
    else:
        assert runs.train(spec, output=tmp_path / "run", observer=observer).step == 1


class Refusing(PlainPasses):
    """Passes that turn out not to be recordable at the first of them."""

    def __init__(self, model: IntervenedModel, task: Task, *, pad_token_id: int, tell: Callable[[str], None]) -> None:
        super().__init__(model, task, torch.amp.GradScaler("cpu", enabled=False))
        tell("this model cannot be recorded: it looks at values on the host")


def test_a_model_that_cannot_be_recorded_is_noted(
    make_spec: MakeSpec, tmp_path: Path, observer, monkeypatch: pytest.MonkeyPatch
):
    inner = choose_execution
    recording = {"recorded": Choice(True)}
    monkeypatch.setattr(
        import_module("reft_cli.runs.train"), "choose_execution", lambda *given: replace(inner(*given), **recording)
    )
    monkeypatch.setattr(loop, "RecordedPasses", Refusing)
    done = runs.train(make_spec("train.max_steps=1"), output=tmp_path / "run", observer=observer)
    reason = "this model cannot be recorded: it looks at values on the host"
    record = RunFolder(done.run).read()
    assert (record["recorded"], record["record_reason"]) == (False, reason)
    assert f"CUDA graphs are off, {reason}" in observer.messages
