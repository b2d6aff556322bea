"""What saves work changes neither loss nor gradients: last MLP and norm at answer rows only, compiled blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from reft_cli.data.batch import build_batch
from reft_cli.data.encode import Example
from reft_cli.models.blocks import find_blocks, norms_behind
from reft_cli.models.build import build_intervened
from reft_cli.models.compiling import compilable_parts, compile_seconds
from reft_cli.models.intervened import IntervenedModel
from reft_cli.positions import Positions
from reft_cli.tasks.objectives import TASKS
from tiny_models import DECODERS, base_of

POSITIONS = Positions.parse("f2+l2")
CAPPED = ("gemma2",)


def intervened(family: str, component: str = "block_output", layers: str = "all") -> IntervenedModel:
    return build_intervened(
        base_of(family), method="loreft", layers=layers, component=component, positions=POSITIONS, tied=True,
        rank=2, init="paper", dropout=0.0, dropout_on="delta", seed=0,
    ).train()  # fmt: skip


def batch_of(layout: str = "padded"):
    chance = torch.Generator().manual_seed(0)
    rows = [(9, 3), (2, 4), (7, 2)]
    examples = [
        Example(torch.randint(5, 200, (sum(row),), generator=chance).tolist(), row[0], None, "", "", number)
        for number, row in enumerate(rows)
    ]
    return build_batch(examples, groups=POSITIONS.groups(tied=True), layout=layout, pad_token_id=1)


def found(model: IntervenedModel, loss_of: Callable, layout: str = "padded") -> list[torch.Tensor]:
    batch = batch_of(layout)
    model.bank.refresh()
    with model.editing(batch.rows):
        loss = loss_of(model, batch)
        loss.backward()
    model.bank.backpropagate()
    gradients = [parameter.grad.clone() for parameter in model.bank.parameters()]
    model.bank.zero_grad()
    return [loss.detach(), *gradients]


def whole_loss(model: IntervenedModel, batch) -> torch.Tensor:
    logits = model.base_model(**batch.inputs, use_cache=False).logits.flatten(0, 1)[batch.answer_rows]
    return torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="sum")


@pytest.mark.parametrize("family", DECODERS)
def test_loss_at_answers_is_that_of_the_whole_model(family: str):
    model = intervened(family)
    with model:
        assert (model.linear_head is None) == (family in CAPPED)
        torch.testing.assert_close(found(model, TASKS["causal_lm"].loss), found(model, whole_loss))
    model.eval()


@pytest.mark.parametrize("component", ["mlp_output", "mlp_activation", "mlp.down_proj.input", "attention_output"])
def test_edits_inside_the_last_mlp_see_all_rows(component: str):
    model = intervened("llama", component)
    with model:
        torch.testing.assert_close(found(model, TASKS["causal_lm"].loss), found(model, whole_loss))
    model.eval()


def test_the_last_mlp_and_norm_run_at_answers_only_and_only_in_the_loss():
    model, seen = intervened("llama"), []
    base = model.base_model.model
    with model, model.editing(None):
        assert model.linear_head is not None  # found by running the model once

    def see(_: object, __: object, out: torch.Tensor) -> None:
        seen.append(out.shape[1])

    inside = base.layers[-1].mlp.up_proj
    with model, inside.register_forward_hook(see), base.norm.register_forward_hook(see, prepend=True):
        found(model, TASKS["causal_lm"].loss)  # the norm is seen before its rows are put back
        with torch.no_grad():
            model.base_model(input_ids=torch.tensor([[5, 6, 7, 8]]))
    model.eval()
    assert seen == [9, 9, 4, 4]


@pytest.mark.parametrize(
    ("family", "names"), [("llama", ["norm"]), ("gpt2", ["ln_f"]), ("gpt_neox", ["final_layer_norm"]), ("bert", [])]
)
def test_norms_behind_the_blocks_are_found(family: str, names: list[str]):
    model = base_of(family).model
    blocks = find_blocks(model)
    parent = model.get_submodule(blocks.path.rpartition(".")[0])
    assert norms_behind(model, blocks) == [getattr(parent, name) for name in names]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_recomputed_activations_see_the_same_answer_rows(layout: str):
    results = []
    for wanted in (False, True):
        model = intervened("llama")
        model.checkpoint_activations(wanted)
        with model, model.packing(layout == "packed"):
            results.append(found(model, TASKS["causal_lm"].loss, layout))
        model.checkpoint_activations(False)
        model.eval()
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_parts_hold_no_hooked_module():
    block = base_of("llama").model.model.layers[0]
    assert compilable_parts(block, {block}) == [block]
    parts = compilable_parts(block, {block.mlp})
    assert parts == [block.self_attn, block.mlp, block.input_layernorm, block.post_attention_layernorm]
    inside = compilable_parts(block, {block.mlp.down_proj})
    assert block.mlp not in inside and block.mlp.down_proj in inside and block.self_attn in inside


def test_nothing_that_is_compiled_is_cut_into_pieces(monkeypatch: pytest.MonkeyPatch):
    """Padded: on a CPU packed attention reads where sequences end, which a GPU's kernels do not."""
    compile_with, counters = torch.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(torch, "compile", lambda made, **_: compile_with(made, backend="aot_eager", dynamic=True))
    model = intervened("llama")
    counters.clear()
    with model, model.compiling():
        for _ in range(2):
            found(model, TASKS["causal_lm"].loss, "padded")
    assert counters["stats"]["unique_graphs"] > 4 and not counters["graph_break"]


def test_compiled_blocks_and_edits_train_like_plain_ones(monkeypatch: pytest.MonkeyPatch):
    """With torch's own interpreter behind the compiler: what is traced and cut is tested, not the code generator."""
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda made, **_: compile_with(made, backend="aot_eager", dynamic=True))
    model = intervened("llama")
    with model, model.packing(True):
        plain = found(model, TASKS["causal_lm"].loss, "packed")
        before = compile_seconds()
        with model.compiling():
            torch.testing.assert_close(found(model, TASKS["causal_lm"].loss, "packed"), plain)
        assert compile_seconds() > before
        assert "forward" not in vars(model.base_model.model.layers[0])
        torch.testing.assert_close(found(model, TASKS["causal_lm"].loss, "packed"), plain)
    model.eval()
