"""A bank: the interventions of all sites of one shape, stacked, and the one interface that all methods share.

A bank knows no model, no positions and no files. What a method adds is its parameters and its folded form; training
runs folded too, so that what is trained is what is merged, served and exported.

Shapes: S sites, r rank, d width, N edited rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from reft_cli.interventions.folded import Folded
from reft_cli.interventions.leaves import Leaves

Init = Literal["paper", "identity"]
DropoutOn = Literal["delta", "output"]


class Bank(nn.Module, ABC):
    """Interventions of `sites` sites on hidden states of `width`; parameters are stacked over sites, in float32.

    An optimizer step is `refresh()`, any number of forward and backward passes, `backpropagate()`, then the
    optimizer's own step. In eval mode the bank looks after itself.
    """

    method: ClassVar[str]
    form: ClassVar[type[Folded]]
    undecayed: ClassVar[frozenset[str]]
    """Names of the parameters that weight decay must leave alone."""

    def __init__(
        self, *, sites: int, width: int, rank: int | None, dropout: float = 0.0, dropout_on: DropoutOn = "delta"
    ) -> None:
        super().__init__()
        self.sites, self.width, self.rank = sites, width, rank
        self.dropout, self.dropout_on = dropout, dropout_on
        self._leaves = Leaves()

    @abstractmethod
    def initialise(self, init: Init, generator: torch.Generator) -> None:
        """Draw the parameters, on the CPU; `identity` makes every delta zero."""

    @abstractmethod
    def _fold(self) -> Folded:
        """The folded form as a differentiable function of the parameters."""

    def refresh(self) -> None:
        """Compute what all sites need from the parameters, once; nothing happens if they have not changed.

        Call it before the first forward pass of each optimizer step. A second call, say in every micro-batch, is free.
        """
        if self._fresh():
            return
        if self._leaves.pending:
            raise RuntimeError(
                f"{self.method}: the weights changed while gradients were waiting; call backpropagate() before the "
                "optimizer's step, or zero_grad() to drop them"
            )
        with torch.inference_mode(False), torch.set_grad_enabled(self.training):
            self._leaves.fill(self._fold().tensors(), parameters=self._parameters.values(), keep_graph=self.training)

    def backpropagate(self) -> None:
        """Add the gradients of all passes since `refresh()` to the parameters' `.grad`; once, before the step."""
        self._leaves.backpropagate()

    def delta(self, site: int, h: Tensor) -> Tensor:
        """What is added to the rows h [N, d] at a site: [N, d], float32 (float64 if h or the bank is)."""
        return self.delta_of(h, self.values(site))

    def values(self, site: int) -> tuple[Tensor, ...]:
        """One site's folded tensors, for `delta_of`."""
        if not torch.compiler.is_compiling() and not self._fresh():
            if self.training:
                raise RuntimeError(f"{self.method}: the weights changed; call refresh() before the forward pass")
            self.refresh()
        return self._leaves.sites[site]

    def delta_of(self, h: Tensor, values: tuple[Tensor, ...]) -> Tensor:
        """`delta` as a function of its tensors alone, the same for all sites."""
        if torch.is_autocast_enabled(h.device.type):
            with torch.autocast(h.device.type, enabled=False):
                return self._delta(h, values)
        return self._delta(h, values)

    def leaves(self) -> list[Tensor]:
        """Tensors to which forward and backward passes add gradients, those of `values` that are trained."""
        return self._leaves.trained()

    def fold(self) -> Folded:
        """A copy of the folded form as it is now, without gradients."""
        with torch.inference_mode(False), torch.no_grad():
            folded = self._fold()
            return type(folded)(
                *(tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in folded.tensors())
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the parameters' gradients, and those that wait for `backpropagate()`."""
        super().zero_grad(set_to_none)
        self._leaves.drop_gradients()

    def _delta(self, h: Tensor, values: tuple[Tensor, ...]) -> Tensor:
        delta = self.form.rows(h, *values)
        if not (self.training and self.dropout):
            return delta
        if self.dropout_on == "delta":
            return functional.dropout(delta, self.dropout)
        return functional.dropout(h + delta, self.dropout) - h

    def _fresh(self) -> bool:
        graph_is_there = self._leaves.graph is not None or not self.training
        return graph_is_there and self._leaves.fresh(self._parameters.values())

    def _apply(self, fn: Any, recurse: bool = True) -> Bank:  # noqa: ANN401  as nn.Module has it
        for name, parameter in self.named_parameters():
            if fn(parameter.detach()[:0]).dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{self.method}: {name} stays float32; interventions are not cast with the base model")
        super()._apply(fn, recurse)
        self._leaves = Leaves()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_leaves": Leaves()}

    def extra_repr(self) -> str:
        """The shape, for print()."""
        return f"method={self.method}, sites={self.sites}, width={self.width}, rank={self.rank}"
