"""An intervention changes the rows it is given, and nothing else, in every family and component."""

from __future__ import annotations

import pytest
import torch

from reft_cli.errors import ModelError
from reft_cli.layers import COMPONENTS
from reft_cli.models.build import build_intervened
from reft_cli.models.intervened import IntervenedModel
from reft_cli.positions import Positions
from tiny_models import DECODERS, ENCODERS, base_of

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
METHODS = ("loreft", "noreft", "direft", "direft_orthogonal", "consreft", "lobireft", "red")
WITHOUT_ACTIVATION = ("mixtral", "qwen3_moe")  # a mixture's experts have no one activation


def intervened(
    family: str = "llama", *, method: str = "loreft", component: str = "block_output", positions: str = "f1+l1", **kw
) -> IntervenedModel:
    values = {"layers": "all", "tied": True, "init": "paper", "dropout": 0.0, "dropout_on": "delta", "seed": 0}
    values |= {"rank": None if method == "red" else 2} | kw
    model = build_intervened(
        base_of(family), method=method, component=component, positions=Positions.parse(positions), **values
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def hooks_of(model: IntervenedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.base_model.modules())


def logits(model: IntervenedModel, rows: dict[str, torch.Tensor] | None, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad(), model, model.editing(rows):
        return model.base_model(input_ids=ids).logits


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_of_every_family_is_edited(family: str, component: str):
    if component == "mlp_activation" and family in WITHOUT_ACTIVATION:
        with pytest.raises(ModelError):
            intervened(family, component=component)
        return
    model = intervened(family, component=component)
    rows = {"f1+l1": torch.tensor([6, 11])}  # first and last token of the second sequence
    plain, edited = logits(model, None), logits(model, rows)
    torch.testing.assert_close(logits(model, {}), plain, rtol=0, atol=0)
    torch.testing.assert_close(edited[0], plain[0], rtol=1e-6, atol=1e-6)  # the first sequence has no edited row
    assert (edited[1] - plain[1]).abs().max() > 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_block_output_is_h_plus_delta_at_the_rows_and_h_elsewhere(method: str):
    model = intervened(method=method, layers=[1])
    rows = torch.tensor([1, 8])
    seen: list[torch.Tensor] = []
    with torch.no_grad(), model:
        with model.base_model.model.layers[1].register_forward_hook(lambda _, __, out: seen.append(out)):
            model.base_model(input_ids=IDS)
            with model.editing({"f1+l1": rows}):
                model.base_model(input_ids=IDS)
        before, after = seen
        expected = before.flatten(0, 1).clone()
        expected[rows] += model.bank.delta(0, expected[rows])
    torch.testing.assert_close(after.flatten(0, 1), expected)
    untouched = [row for row in range(12) if row not in (1, 8)]
    torch.testing.assert_close(after.flatten(0, 1)[untouched], before.flatten(0, 1)[untouched], rtol=0, atol=0)


def test_untied_groups_have_weights_of_their_own():
    model = intervened(positions="f2+l2", tied=False)
    assert [site.group for site in model.sites] == ["f2"] * 3 + ["l2"] * 3
    first, last = {"f2": torch.tensor([0])}, {"l2": torch.tensor([0])}
    assert not torch.allclose(logits(model, first), logits(model, last))


def test_hooks_go_and_those_of_others_stay():
    model = intervened()
    there = hooks_of(model)
    calls: list[int] = []
    foreign = model.base_model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    plain = logits(model, None)
    logits(model, {"f1+l1": torch.tensor([0])})
    assert hooks_of(model) == there + 1
    with foreign, torch.no_grad(), model.editing({"f1+l1": torch.tensor([0])}):
        torch.testing.assert_close(model.base_model(input_ids=IDS).logits, plain, rtol=0, atol=0)  # not entered
    assert len(calls) == 3


def test_hooks_go_after_an_exception():
    model = intervened()
    there = hooks_of(model)
    with pytest.raises(ZeroDivisionError), model, model.editing({"f1+l1": torch.tensor([0])}):
        raise ZeroDivisionError
    assert hooks_of(model) == there


def test_logits_at_rows_are_those_of_the_whole():
    for family in ("llama", "gemma2", "gpt_neox", "opt"):
        model = intervened(family)
        rows, answers = {"f1+l1": torch.tensor([0, 11])}, torch.tensor([2, 4, 9])
        with torch.no_grad(), model, model.editing(rows):
            some = model.logits_at({"input_ids": IDS}, answers)
        torch.testing.assert_close(some, logits(model, rows).flatten(0, 1)[answers])


def test_no_gradient_below_the_lowest_edited_layer_and_none_in_the_base():
    model = intervened(layers=[1]).train()
    model.bank.refresh()
    seen: dict[int, bool] = {}
    layers = model.base_model.model.layers
    with model, model.editing({"f1+l1": torch.tensor([0, 6])}):
        hooks = [
            layer.register_forward_hook(lambda _, __, out, i=i: seen.update({i: out.requires_grad}))
            for i, layer in enumerate(layers)
        ]
        model.base_model(input_ids=IDS).logits.sum().backward()
    model.bank.backpropagate()
    for hook in hooks:
        hook.remove()
    model.eval()
    assert seen == {0: False, 1: True, 2: True}
    assert all(p.grad is None for p in model.base_model.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.bank.parameters())


@pytest.mark.parametrize("component", COMPONENTS)
def test_gradient_checkpointing_gives_the_same_gradients(component: str):
    found = []
    for checkpointing in (False, True):
        model = intervened(component=component).train()
        model.checkpoint_activations(checkpointing)
        model.bank.refresh()
        with model, model.editing({"f1+l1": torch.tensor([0, 5, 6, 11])}):
            model.base_model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        model.bank.backpropagate()
        found.append({name: p.grad for name, p in model.bank.named_parameters()})
        model.checkpoint_activations(False)
        model.eval()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_last_layer_trains_only_what_the_loss_can_see():
    model = intervened(layers=[2], positions="f2+l2", tied=False).train()
    model.bank.refresh()
    with model, model.editing({"f2": torch.tensor([0, 1]), "l2": torch.tensor([2, 3])}):
        model.logits_at({"input_ids": IDS[:1]}, torch.tensor([3, 4])).sum().backward()
    model.bank.backpropagate()
    model.eval()
    gradient = model.bank.source_weight.grad
    assert gradient[0].abs().max() == 0  # the prefix of the last layer reaches no answer
    assert gradient[1].abs().max() > 0


def test_checkpointing_adds_no_gradient_below_the_lowest_edited_layer():
    model = intervened(layers=[1]).train()
    model.checkpoint_activations(True)
    seen: list[bool] = []
    layers = model.base_model.model.layers
    with model, layers[0].register_forward_hook(lambda _, __, out: seen.append(out.requires_grad)):
        model.bank.refresh()
        with model.editing({"f1+l1": torch.tensor([0, 6])}):
            model.base_model(input_ids=IDS, use_cache=False).logits.sum().backward()
    model.checkpoint_activations(False)
    model.eval()
    assert seen == [False]


def test_a_token_costs_four_operations_a_weight_above_the_lowest_edit_and_two_below():
    """Of all weights but the embedding's, by the share of blocks that have a backward pass."""
    weights = sum(each.numel() for each in base_of("llama").model.parameters()) - 300 * 32
    for layers, expected in (("all", 4), ("1;2", 2 + 4 / 3), ("2", 2 + 2 / 3)):
        assert intervened(layers=layers).operations_a_token() == pytest.approx(expected * weights)
