"""Recorded and compiled passes give the losses and gradients of plain ones."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
import transformers

from reft_cli.data.batch import Batch, build_batch
from reft_cli.data.examples import Example, Examples
from reft_cli.models.build import build_intervened
from reft_cli.models.float8 import to_float8
from reft_cli.models.intervened import IntervenedModel
from reft_cli.models.loading import BaseModel, shape_hash
from reft_cli.models.packing import why_not_shared
from reft_cli.positions import Positions
from reft_cli.tasks.objectives import TASKS
from reft_cli.tasks.preferences import Preference
from reft_cli.training import passes
from reft_cli.training.frozen_cache import CachedPasses
from reft_cli.training.passes import Passes, PlainPasses, RecordedPasses
from reft_cli.training.reference import ReferencePasses

pytestmark = pytest.mark.gpu
POSITIONS = Positions.parse("f3+l3")
TASK = TASKS["causal_lm"]


def base_of(family: str, dtype: torch.dtype, more: dict[str, int] | None = None) -> BaseModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"intermediate_size": 160, "num_key_value_heads": 2, "max_position_embeddings": 256} | (more or {})
    config = getattr(transformers, f"{family}Config")(**shape, pad_token_id=1, bos_token_id=0, eos_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).to("cuda", dtype)
    return BaseModel(model, family, None, shape_hash(model))


def intervened(
    base: BaseModel, method: str = "loreft", layers: str = "all", component: str = "block_output"
) -> IntervenedModel:
    return build_intervened(
        base, method=method, layers=layers, component="mlp_output" if method == "red" else component,
        positions=POSITIONS, tied=True, rank=None if method == "red" else 4, init="paper", dropout=0.0,
        dropout_on="delta", seed=0,
    ).train()  # fmt: skip


SIZES = (20, 21, 60, 22, 61)  # of prompts; filled up they are two


def examples() -> Examples:
    """Six rows of each size."""
    chance = torch.Generator().manual_seed(0)
    prompts = [size + row for size in SIZES for row in range(6)]
    return Examples.of(
        Example(torch.randint(5, 300, (prompt + 4,), generator=chance).tolist(), prompt, None, "", "", row)
        for row, prompt in enumerate(prompts)
    )


def batches() -> list[Batch]:
    """A batch of each size."""
    groups, rows = POSITIONS.groups(tied=True), examples()
    return [
        build_batch(rows[6 * at : 6 * at + 6], groups=groups, layout="packed", pad_token_id=1)
        for at in range(len(SIZES))
    ]


HEADS = (17, 0, 50, 18, 40)  # of each batch, tokens that its rows begin with alike


def batches_of_heads(*, shared: bool) -> list[Batch]:
    """Such batches, with whole rows or with the head once."""
    rows, found = list(examples()), []
    for at, head in enumerate(HEADS):
        mine = rows[6 * at : 6 * at + 6]
        same = [replace(row, input_ids=mine[0].input_ids[:head] + row.input_ids[head:]) for row in mine]
        groups = POSITIONS.groups(tied=True)
        found.append(build_batch(same, groups=groups, layout="packed", pad_token_id=1, share_head=shared))
    return found


def found(model: IntervenedModel, passes: Passes, batch: Batch) -> list[torch.Tensor]:
    model.bank.refresh()
    loss = passes(passes.prepare(batch), units=24)
    model.bank.backpropagate()
    gradients = [parameter.grad.clone() for parameter in model.bank.parameters()]
    model.bank.zero_grad()
    return [loss.clone(), *gradients]


def plain_passes(model: IntervenedModel) -> PlainPasses:
    return PlainPasses(model, TASK, torch.amp.GradScaler("cuda", enabled=False))


@contextmanager
def packed(model: IntervenedModel) -> Iterator[None]:
    with model, model.packing(True):
        yield


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Gemma3Text"])
@pytest.mark.parametrize("method", ["loreft", "red"])
def test_recorded_passes_are_plain_passes(family: str, method: str):
    model = intervened(base_of(family, torch.bfloat16), method)
    recorded, plain = RecordedPasses(model, TASK, pad_token_id=1), plain_passes(model)
    with packed(model):
        for _ in range(3):
            for batch in batches():
                torch.testing.assert_close(
                    found(model, recorded, batch), found(model, plain, batch), rtol=2e-2, atol=2e-3
                )
    assert len(recorded._recordings) == 2


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Gemma3Text"])
@pytest.mark.parametrize("compiled", [False, True])
def test_passes_that_share_a_head_are_those_of_whole_rows(family: str, compiled: bool):
    model = intervened(base_of(family, torch.bfloat16, {"head_dim": 32, "sliding_window": 40}))
    assert why_not_shared(model.base_model) is None
    recorded, plain = RecordedPasses(model, TASK, pad_token_id=1), plain_passes(model)
    whole, shared = (batches_of_heads(shared=each) for each in (False, True))
    assert [int(each.inputs["shared_head"]) for each in shared] == list(HEADS)
    with packed(model):
        expected = [found(model, plain, batch) for batch in whole]
        with model.compiling() if compiled else nullcontext():
            for passes_of in (plain, recorded, recorded, recorded):
                for batch, wanted in zip(shared, expected, strict=True):
                    torch.testing.assert_close(found(model, passes_of, batch), wanted, rtol=5e-2, atol=5e-3)
    assert len(recorded._recordings) <= 3 and not recorded.refused


def test_float32_shares_heads_without_kernels():
    model = intervened(base_of("Llama", torch.float32))
    plain = plain_passes(model)
    with packed(model):
        for whole, shared in zip(batches_of_heads(shared=False), batches_of_heads(shared=True), strict=True):
            torch.testing.assert_close(found(model, plain, shared), found(model, plain, whole), rtol=1e-3, atol=1e-5)


def test_recordings_follow_the_weights():
    model = intervened(base_of("Llama", torch.bfloat16))
    recorded, plain = RecordedPasses(model, TASK, pad_token_id=1), plain_passes(model)
    batch = batches()[0]
    with packed(model):
        before = [found(model, recorded, batch) for _ in range(3)][-1]
        with torch.no_grad():
            model.bank.source_bias += 1.0
        after = found(model, recorded, batch)
        torch.testing.assert_close(after, found(model, plain, batch), rtol=2e-2, atol=2e-3)
    assert (after[0] - before[0]).abs() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", ["all", "1;2"])
def test_compiled_passes_are_plain_passes(dtype: torch.dtype, layers: str):
    model = intervened(base_of("Llama", dtype), layers=layers)
    plain = plain_passes(model)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-3}
    with packed(model):
        expected = [found(model, plain, batch) for batch in batches()]
        with model.compiling():
            for batch, wanted in zip(batches(), expected, strict=True):
                torch.testing.assert_close(found(model, plain, batch), wanted, **close)
            if dtype == torch.bfloat16:
                recorded = RecordedPasses(model, TASK, pad_token_id=1)
                for _ in range(3):
                    for batch, wanted in zip(batches(), expected, strict=True):
                        torch.testing.assert_close(found(model, recorded, batch), wanted, **close)


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
@pytest.mark.parametrize("component", ["block_output", "block_input", "mlp_output", "attention_output"])
def test_edits_in_kernels_are_plain_edits(family: str, component: str):
    model = intervened(base_of(family, torch.float32), component=component)
    plain = plain_passes(model)
    with packed(model):
        expected = [found(model, plain, batch) for batch in batches()]
        model._fuse(True)  # the edits run in kernels; blocks as they are
        again = [found(model, plain, batch) for batch in batches()]
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_checkpointed_passes_are_plain_passes(fused: bool):
    model = intervened(base_of("Llama", torch.float32))
    plain = plain_passes(model)
    with packed(model):
        expected = [found(model, plain, batch) for batch in batches()]
        model.checkpoint_activations(True)
        model._fuse(fused)  # the edits run in kernels; blocks as they are
        again = [found(model, plain, batch) for batch in batches()]
    torch.testing.assert_close(again, expected, rtol=1e-4 if fused else 1e-5, atol=1e-5 if fused else 1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_cached_passes_are_plain_passes(compiled: bool):
    model = intervened(base_of("Llama", torch.bfloat16), layers="1;2")
    plain, ran = plain_passes(model), []
    recorded = RecordedPasses(model, TASK, pad_token_id=1)
    cached = CachedPasses(recorded, plain, tokens=len(examples().tokens))
    with packed(model), model.base_model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1)):
        expected = [found(model, plain, batch) for batch in batches()]
        with model.compiling() if compiled else nullcontext():
            for _ in range(4):
                for batch, wanted in zip(batches(), expected, strict=True):
                    torch.testing.assert_close(found(model, cached, batch), wanted, rtol=5e-2, atol=5e-3)
    assert len(recorded._recordings) == 2 and model.frozen.modules


def pairs() -> Examples:
    """Pairs of two sizes, seven of each, whose answers are of other lengths."""
    chance = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(5, 300, (count,), generator=chance).tolist()

    made = []
    for row in range(14):
        prompt = tokens(20 if row < 7 else 60)
        other = Example(prompt + tokens(3 + row % 2), len(prompt), None, "", "", row)
        made.append(Example(prompt + tokens(4 - row % 2), len(prompt), None, "", "", row, rejected=other))
    return Examples.of(made)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layers", ["all", "1;2"])
def test_recorded_passes_of_pairs_are_plain_passes(compiled: bool, layers: str):
    model, task, rows = intervened(base_of("Llama", torch.bfloat16), layers=layers), Preference(0.5), pairs()
    plain = PlainPasses(model, task, torch.amp.GradScaler("cuda", enabled=False))
    recorded = RecordedPasses(model, task, pad_token_id=1)
    kept = ReferencePasses(recorded, model, task, rows)
    groups = POSITIONS.groups(tied=True)
    parts = [slice(0, 5), slice(7, 12), slice(2, 7), slice(9, 14)]
    with packed(model), model.compiling() if compiled else nullcontext():
        for part in parts * 3:
            batch = build_batch(rows[part], groups=groups, layout="packed", pad_token_id=1)
            with kept.of_step(rows[part]):
                ours = found(model, kept, batch)
            torch.testing.assert_close(ours, found(model, plain, batch), rtol=5e-2, atol=5e-3)
    assert len(recorded._recordings) == 2 and not recorded.refused


@pytest.mark.parametrize("compiled", [False, True])
def test_a_float8_base_trains_about_as_the_wide_one(compiled: bool):
    losses = []
    for small in (False, True):
        base = base_of("Llama", torch.bfloat16)
        if small:
            to_float8(base.model)
        model = intervened(base)
        with packed(model), model.compiling() if compiled else nullcontext():
            losses.append([found(model, plain_passes(model), batch) for batch in batches()])
    for wide, narrow in zip(*losses, strict=True):
        torch.testing.assert_close(narrow[0], wide[0], rtol=2e-2, atol=2e-2)
        for gradient, other in zip(wide[1:], narrow[1:], strict=True):
            assert (gradient - other).norm() <= 0.2 * gradient.norm()


def test_a_model_that_cannot_be_recorded_runs_as_it_comes():
    model, said = intervened(base_of("Llama", torch.bfloat16)), []
    recorded, plain = RecordedPasses(model, TASK, pad_token_id=1, tell=said.append), plain_passes(model)

    def look(*_: object) -> None:
        torch.ones(1, device="cuda").item()  # the host waits, which no graph can hold

    with packed(model), model.base_model.model.layers[1].mlp.register_forward_hook(look):
        for _ in range(3):
            for batch in batches():
                torch.testing.assert_close(
                    found(model, recorded, batch), found(model, plain, batch), rtol=2e-2, atol=2e-3
                )
    assert recorded.refused and len(said) == 1
    assert said[0].startswith("this model cannot be recorded: CUDA error")
    assert "previous error" not in said[0], "the first one says what it was"


def test_recordings_that_do_not_fit_are_given_up(monkeypatch: pytest.MonkeyPatch):
    model, said = intervened(base_of("Llama", torch.bfloat16)), []
    recorded, plain = RecordedPasses(model, TASK, pad_token_id=1, tell=said.append), plain_passes(model)
    # Up to torch 2.11 a pool that has no recording ends the process when it goes, if a recording failed there before.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(recorded._pool))

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(passes, "_Recording", full)
    with packed(model):
        for _ in range(3):
            for batch in batches():
                torch.testing.assert_close(
                    found(model, recorded, batch), found(model, plain, batch), rtol=2e-2, atol=2e-3
                )
    assert recorded.refused and said == ["there is too little memory to record more than 0 sizes of passes"]
