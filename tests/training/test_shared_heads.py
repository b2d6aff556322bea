"""Passes whose rows share a head have the loss and the gradients of passes whose rows stand whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reft_cli.data.batch import Batch, build_batch
from reft_cli.data.capacity import fill
from reft_cli.data.examples import Example
from reft_cli.data.loader import Loader
from reft_cli.models import attention
from reft_cli.models.build import build_intervened
from reft_cli.models.intervened import IntervenedModel
from reft_cli.models.packing import why_not_packed, why_not_shared
from reft_cli.positions import Positions
from reft_cli.tasks.objectives import TASKS
from reft_cli.training.passes import PlainPasses
from tiny_models import DECODERS, base_of

CHANCE = torch.Generator().manual_seed(0)
SIZES = [(9, 3), (5, 4), (5, 4), (2, 6), (14, 1), (9, 3)]  # of each row, tokens of the prompt after the head, answer


def drawn(count: int) -> list[int]:
    return torch.randint(5, 200, (count,), generator=CHANCE).tolist()


TEMPLATE = drawn(21)
ROWS = [
    Example([*TEMPLATE, *drawn(prompt + answer)], len(TEMPLATE) + prompt, None, "", "", row)
    for row, (prompt, answer) in enumerate(SIZES)
]


def intervened(
    family: str, positions: str, *, layers: str = "all", component: str = "block_output", tied: bool = True
) -> IntervenedModel:
    return build_intervened(
        base_of(family), method="loreft", layers=layers, component=component, positions=Positions.parse(positions),
        tied=tied, rank=2, init="paper", dropout=0.0, dropout_on="delta", seed=0,
    ).train()  # fmt: skip


def loader_of(positions: str, *, shared: bool, rows: list[Example] = ROWS, tied: bool = True) -> Loader:
    return Loader(
        rows, groups=Positions.parse(positions).groups(tied=tied), layout="packed", pad_token_id=1, token_budget=90,
        micro_batch_size=None, device=torch.device("cpu"), share_head=shared,
    )  # fmt: skip


def found(model: IntervenedModel, batches: list[Batch]) -> list[torch.Tensor]:
    """The summed loss of some passes, and its gradients."""
    with model, model.packing(True):
        numbers = found_inside(model, batches)
    model.eval()
    return numbers


def found_inside(model: IntervenedModel, batches: list[Batch]) -> list[torch.Tensor]:
    """The same where the hooks are on already."""
    passes = PlainPasses(model, TASKS["causal_lm"], torch.amp.GradScaler("cpu", enabled=False))
    model.bank.refresh()
    loss = torch.stack([passes(each, units=10) for each in batches]).sum()
    model.bank.backpropagate()
    gradients = [parameter.grad.clone() for parameter in model.bank.parameters()]
    model.bank.zero_grad()
    return [loss, *gradients]


def passes_of(positions: str, *, tied: bool = True, rows: list[Example] = ROWS) -> tuple[list[Batch], list[Batch]]:
    """The passes of a step, two or more, with whole rows and with a shared head."""
    whole, shared = (
        loader_of(positions, shared=each, rows=rows, tied=tied).build(range(len(rows))).passes for each in (False, True)
    )
    assert len(whole) == len(shared) > 1
    return whole, shared


def tokens(batches: list[Batch]) -> int:
    return sum(len(each.places) for each in batches)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2", "mistral"])
@pytest.mark.parametrize("positions", ["f7+l7", "prompt", "l1"])
def test_loss_and_gradients_are_those_of_whole_rows(family: str, positions: str):
    whole, shared = passes_of(positions)
    assert tokens(shared) <= tokens(whole) - 2 * len(TEMPLATE)
    model = intervened(family, positions)
    torch.testing.assert_close(found(model, shared), found(model.train(), whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("positions", "given"),
    [
        ("f7+l7", {"layers": "1;2"}),
        ("f7+l7", {"tied": False}),
        ("all", {"component": "mlp_activation"}),
        ("f3", {"component": "attention_output"}),
        ("generated", {"component": "self_attn.v_proj.output"}),
    ],
)
def test_so_are_those_of_other_sites(positions: str, given: dict):
    whole, shared = passes_of(positions, tied=given.get("tied", True))
    model = intervened("llama", positions, **given)
    torch.testing.assert_close(found(model, shared), found(model.train(), whole), rtol=1e-4, atol=1e-6)


def test_activations_are_computed_again_with_the_head():
    whole, shared = passes_of("f7+l7")
    model = intervened("llama", "f7+l7")
    expected = found(model, whole)
    model.train().checkpoint_activations(True)
    torch.testing.assert_close(found(model, shared), expected, rtol=1e-4, atol=1e-6)
    model.checkpoint_activations(False)


@pytest.mark.slow
def test_compiled_blocks_take_a_head(monkeypatch: pytest.MonkeyPatch):
    """With torch's own interpreter behind the compiler."""
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda made, **_: compile_with(made, backend="aot_eager", dynamic=True))
    whole, shared = passes_of("f7+l7")
    model = intervened("llama", "f7+l7")
    expected = found(model, whole[:1])
    with model, model.packing(True), model.compiling():
        torch.testing.assert_close(found_inside(model.train(), shared[:1]), expected, rtol=1e-4, atol=1e-6)
    model.eval()


def test_passes_of_a_step_have_heads_of_their_own():
    """One pass of rows of another template, and one of both, which has no head."""
    other = drawn(40)
    rows = [*ROWS, *(Example([*other, *drawn(6)], 42, None, "", "", 9 + row) for row in range(3))]
    whole, shared = passes_of("f7+l7", rows=rows)
    heads = [each.inputs["shared_head"] for each in shared]
    assert len(set(heads)) > 1 and 0 in heads, heads
    model = intervened("llama", "f7+l7")
    torch.testing.assert_close(found(model, shared), found(model.train(), whole), rtol=1e-4, atol=1e-6)


def test_filled_up_passes_are_the_same():
    whole, shared = passes_of("f7+l7")
    model = intervened("llama", "f7+l7")
    full = [fill(each, pad_token_id=1) for each in shared]
    torch.testing.assert_close(found(model, full), found(model.train(), whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", DECODERS)
def test_sharing_is_known_by_trying(family: str):
    model = base_of(family).model
    assert why_not_shared(model) == why_not_packed(model)


def test_a_model_that_hides_the_head_does_not_share_it(monkeypatch: pytest.MonkeyPatch):
    model = base_of("llama").model
    inner = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda **kwargs: inner(**{k: v for k, v in kwargs.items() if k != "shared_head"})
    )
    assert why_not_packed(model) is None
    assert why_not_shared(model) == "its logits change when sequences share their head"


def test_a_gradient_that_forgets_the_head_is_found(monkeypatch: pytest.MonkeyPatch):
    model = base_of("llama").model
    inner = attention._attended

    def forgetful(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *given: object) -> torch.Tensor:
        known = k.shape[2] - q.shape[2]
        v = torch.cat([v[:, :, :known].detach(), v[:, :, known:]], 2)
        return inner(q, k, v, *given)

    monkeypatch.setattr(attention, "_attended", forgetful)
    assert why_not_packed(model) is None
    assert why_not_shared(model) == "its gradients change when sequences share their head"


@pytest.mark.parametrize("window", [None, 3, 8])
def test_a_window_reaches_into_the_head(window: int | None):
    """Beside every score written out, for sequences that repeat the head."""
    torch.manual_seed(0)
    head, rests = 6, [5, 5, 1, 3]
    query, key, value = (torch.randn(1, heads, head + sum(rests), 8, requires_grad=True) for heads in (4, 2, 2))
    bounds = [0, head, *(head + sum(rests[: at + 1]) for at in range(len(rests)))]
    ours = attention._by_length(query, key, value, bounds, 0.3, window, True)[0]
    for start, rest in zip(bounds[1:], rests, strict=False):
        at = torch.cat([torch.arange(head), torch.arange(start, start + rest)])
        q, k, v = (each[0][:, at] for each in (query, key, value))
        scores = 0.3 * q @ k.repeat_interleave(2, 0).mT
        distance = torch.arange(len(at))[:, None] - torch.arange(len(at))[None]
        hidden = (distance < 0) | (distance >= (window or len(at)))
        wanted = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 0)
        torch.testing.assert_close(ours[at], wanted.transpose(0, 1))


def test_one_row_has_no_head_to_share():
    batch = build_batch(
        ROWS[:1], groups=Positions.parse("f3").groups(tied=True), layout="packed", pad_token_id=1, share_head=True
    )
    whole = replace(batch, inputs={name: each for name, each in batch.inputs.items() if name != "shared_head"})
    model = intervened("llama", "f3")
    torch.testing.assert_close(found(model, [batch]), found(model.train(), [whole]))
