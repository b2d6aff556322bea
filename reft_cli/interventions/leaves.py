"""Values computed from parameters once an optimizer step, used many times, and their gradients carried back once.

The values are cut off from the graph that made them, and split by site: every site is an autograd leaf of its own. Any
number of forward and backward passes then leaves gradients on the leaves, and one more backward pass, through the
graph that was kept, leaves them on the parameters. The leaves stay where they are in memory from step to step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class Leaves:
    """Detached copies of stacked values [S, …], by site."""

    def __init__(self) -> None:
        self.values: tuple[Tensor, ...] = ()
        self.sites: list[tuple[Tensor, ...]] = []
        self.graph: tuple[Tensor, ...] | None = None
        self.stamp: tuple[tuple[int, int], ...] | None = None

    def fill(self, values: tuple[Tensor, ...], *, parameters: Iterable[Tensor | None], keep_graph: bool) -> None:
        """Copy values that were just computed from the parameters."""
        if [(v.shape, v.dtype, v.device) for v in values] != [(v.shape, v.dtype, v.device) for v in self.values]:
            self.values = tuple(torch.empty_like(v, requires_grad=False) for v in values)
            views = [value.unbind() for value in self.values]
            self.sites = [tuple(view.detach() for view in site) for site in zip(*views, strict=True)]
        with torch.no_grad():
            for value, new in zip(self.values, values, strict=True):
                value.copy_(new)
        for site in self.sites:
            for leaf, new in zip(site, values, strict=True):
                leaf.requires_grad_(keep_graph and new.requires_grad)
        self.graph = values if keep_graph else None
        self.stamp = _versions(parameters)

    def fresh(self, parameters: Iterable[Tensor | None]) -> bool:
        """Whether the values are those of the parameters as they are now."""
        return self.stamp is not None and self.stamp == _versions(parameters)

    @property
    def pending(self) -> bool:
        """Whether a leaf holds a gradient that no parameter has seen."""
        return any(leaf.grad is not None for site in self.sites for leaf in site)

    def backpropagate(self) -> None:
        """Add the leaves' gradients, seen through the graph, to those of the parameters; zero for a site not used."""
        assert self.graph is not None, "nothing to go back through: call refresh() in training mode first"
        roots, gradients = [], []
        for root, leaves in zip(self.graph, zip(*self.sites, strict=True), strict=True):
            if root.requires_grad:
                roots.append(root)
                zero = root.new_zeros(()).expand_as(root[0])
                gradients.append(torch.stack([zero if leaf.grad is None else leaf.grad for leaf in leaves]))
        if roots:
            torch.autograd.backward(roots, gradients)
        self.drop_gradients()
        self.graph = self.stamp = None

    def drop_gradients(self) -> None:
        """Forget gradients that were not carried back."""
        for site in self.sites:
            for leaf in site:
                leaf.grad = None


def _versions(parameters: Iterable[Tensor | None]) -> tuple[tuple[int, int], ...]:
    return tuple((id(parameter), parameter._version) for parameter in parameters if parameter is not None)


def _count_fused_steps(optimizer: Optimizer, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version(group["params"])


register_optimizer_step_post_hook(_count_fused_steps)  # fused optimizers do not raise the version of what they write
