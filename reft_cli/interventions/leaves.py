"""Values computed from parameters once an optimizer step, used many times, and their gradients carried back once.

The values are cut off from the graph that made them, and split by site: every site is an autograd leaf of its own. Any
number of forward and backward passes then adds up gradients in one stacked tensor a value, of which each leaf's `.grad`
is a row; one more backward pass, through the graph that was kept, carries them to the parameters. Values and gradients
stay where they are in memory from step to step, so that a pass can be recorded once and replayed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class Leaves:
    """Detached copies of stacked values [S, …], by site, and their gradients."""

    def __init__(self) -> None:
        self.values: tuple[Tensor, ...] = ()
        self.gradients: tuple[Tensor, ...] = ()
        self.sites: list[tuple[Tensor, ...]] = []
        self.graph: tuple[Tensor, ...] | None = None
        self.stamp: tuple[tuple[int, int], ...] | None = None

    def fill(self, values: tuple[Tensor, ...], *, parameters: Iterable[Tensor | None], keep_graph: bool) -> None:
        """Copy values that were just computed from the parameters."""
        if [(v.shape, v.dtype, v.device) for v in values] != [(v.shape, v.dtype, v.device) for v in self.values]:
            # contiguous, for kernels: what a solve gives is laid out by columns
            self.values = tuple(v.new_empty(v.shape, requires_grad=False) for v in values)
            self.gradients = ()
            views = [value.unbind() for value in self.values]
            self.sites = [tuple(view.detach() for view in site) for site in zip(*views, strict=True)]
        with torch.no_grad():
            for value, new in zip(self.values, values, strict=True):
                value.copy_(new)
        for site in self.sites:
            for leaf, new in zip(site, values, strict=True):
                leaf.requires_grad_(keep_graph and new.requires_grad)
        if keep_graph and not self.gradients:
            self._give_gradients()
        self.graph = values if keep_graph else None
        self.stamp = _versions(parameters)

    def _give_gradients(self) -> None:
        self.gradients = tuple(torch.zeros_like(value) for value in self.values)
        for site, *gradients in zip(self.sites, *self.gradients, strict=True):
            for leaf, gradient in zip(site, gradients, strict=True):
                leaf.grad = gradient

    def fresh(self, parameters: Iterable[Tensor | None]) -> bool:
        """Whether the values are those of the parameters as they are now."""
        return self.stamp is not None and self.stamp == _versions(parameters)

    @property
    def pending(self) -> bool:
        """Whether there are gradients that no parameter has seen; the host waits for the device to find out."""
        return self.graph is not None and any(bool(gradient.any()) for gradient in self.gradients)

    def backpropagate(self) -> None:
        """Add the leaves' gradients, seen through the graph, to those of the parameters; zero for a site not used."""
        assert self.graph is not None, "nothing to go back through: call refresh() in training mode first"
        used = [pair for pair in zip(self.graph, self.gradients, strict=True) if pair[0].requires_grad]
        if used:
            torch.autograd.backward([root for root, _ in used], [gradient for _, gradient in used])
        self.drop_gradients()
        self.graph = self.stamp = None

    def drop_gradients(self) -> None:
        """Forget gradients that were not carried back."""
        for gradient in self.gradients:
            gradient.zero_()

    def trained(self) -> list[Tensor]:
        """The leaves that take gradients."""
        return [leaf for site in self.sites for leaf in site if leaf.requires_grad]


def _versions(parameters: Iterable[Tensor | None]) -> tuple[tuple[int, int], ...]:
    return tuple((id(parameter), parameter._version) for parameter in parameters if parameter is not None)


def _count_fused_steps(optimizer: Optimizer, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version(group["params"])


register_optimizer_step_post_hook(_count_fused_steps)  # fused optimizers do not raise the version of what they write
