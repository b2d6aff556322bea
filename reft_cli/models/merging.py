"""Puts an intervention of every token into the weights for a while, where that is exact, so that it costs nothing.

At the output of a linear layer an affine edit is another linear layer: h = Wx + c becomes
h + upᵀ(down h + bias) = (W + upᵀ down W) x + c + upᵀ(down c + bias), and a diagonal one (1 + s) ⊙ h + t. That holds for
`mlp_output` and `attention_output` where the module returns what its last linear layer makes, which is tried. Weights
change in place, so that captured steps see them, and are put back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from reft_cli.interventions.folded import FoldedDiagonal, FoldedLowRank
from reft_cli.models.blocks import Target, find_blocks, find_target, hidden_output
from reft_cli.models.stacked import Member

Linear: TypeAlias = nn.Linear | Conv1D  # Conv1D keeps its weight as [in, out]
EXACT_AT = ("mlp_output", "attention_output")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Merge:
    """A member and the linear layer of each of its sites. `with merge.merged(): ...` has it in the weights."""

    def __init__(self, member: Member, layers: list[Linear]) -> None:
        self.member, self.layers = member, layers
        self._biases = [_new_bias(layer) for layer in layers]

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, the base model is the intervened model at every token."""
        before = [(layer.weight, layer.weight.detach().clone(), layer.bias) for layer in self.layers]
        try:
            for site, (layer, bias) in enumerate(zip(self.layers, self._biases, strict=True)):
                self._merge(site, layer, bias)
            yield
        finally:
            with torch.no_grad():
                for layer, (weight, kept, bias) in zip(self.layers, before, strict=True):
                    weight.copy_(kept)
                    layer.bias = bias

    @torch.no_grad()
    def _merge(self, site: int, layer: Linear, bias: nn.Parameter) -> None:
        weight = layer.weight
        folded, columns = self.member.folded, isinstance(layer, Conv1D)
        wide = torch.promote_types(weight.dtype, folded.tensors()[0].dtype)
        rows = (weight.T if columns else weight).to(wide)  # [D, in]
        constant = torch.zeros_like(bias, dtype=wide) if layer.bias is None else layer.bias.to(wide)  # [D]
        if isinstance(folded, FoldedLowRank):
            down, shift, up = (tensor[site].to(wide) for tensor in folded.tensors())
            rows, constant = rows + up.T @ (down @ rows), constant + (down @ constant + shift) @ up
        else:
            assert isinstance(folded, FoldedDiagonal)
            scale, shift = (tensor[site].to(wide) for tensor in folded.tensors())
            rows, constant = rows * (1 + scale)[:, None], constant * (1 + scale) + shift
        weight.copy_(rows.T if columns else rows)
        bias.copy_(constant)
        layer.bias = bias


def _new_bias(layer: Linear) -> nn.Parameter:
    width = layer.weight.shape[1 if isinstance(layer, Conv1D) else 0]
    return nn.Parameter(layer.weight.new_zeros(width), requires_grad=False)


def find_merge(model: PreTrainedModel, member: Member) -> Merge | None:
    """A member's merge; None where its weights would not be exact: other positions, components or modules."""
    if any(group.part != "all" for group in member.groups) or len(member.groups) != 1:
        return None
    if any(site.component not in EXACT_AT for site in member.sites):
        return None
    blocks = find_blocks(model)
    targets = [find_target(blocks, site.layer, site.component) for site in member.sites]
    layers = _linear_ends(model, targets)
    if None in layers or len(set(layers)) != len(layers):
        return None
    return Merge(member, [layer for layer in layers if layer is not None])


@torch.inference_mode()
def _linear_ends(model: PreTrainedModel, targets: list[Target]) -> list[Linear | None]:
    """For each target the linear layer whose output it returns as it is; found by running them."""
    outputs: dict[nn.Module, Tensor] = {}

    def remember(module: nn.Module, _: object, output: object) -> None:
        outputs[module] = hidden_output(output).clone()

    linear = [[each for each in target.module.modules() if type(each) in (nn.Linear, Conv1D)] for target in targets]
    watched = {module for target, inside in zip(targets, linear, strict=True) for module in (target.module, *inside)}
    with ExitStack() as hooks:
        for module in watched:
            hooks.enter_context(module.register_forward_hook(remember))
        model(torch.tensor([[5, 6, 7]], device=model.device), use_cache=False)
    return [_same(outputs, target, inside) for target, inside in zip(targets, linear, strict=True)]


def _same(outputs: dict[nn.Module, Tensor], target: Target, inside: list[nn.Module]) -> Linear | None:
    wanted = outputs.get(target.module)
    for layer in inside:
        given = outputs.get(layer)
        if wanted is None or given is None or target.end != "output":
            continue
        if given.numel() == wanted.numel() and torch.equal(given.flatten(), wanted.flatten()):
            assert isinstance(layer, Linear)
            plain = type(layer.weight.data) is Tensor and layer.weight.dtype in FLOATS  # not a quantised one
            return layer if plain else None
    return None
