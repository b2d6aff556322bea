"""Edits rows of hidden states, forward and backward, at the cost of the rows and one copy of the rest.

Shapes: B batch, T tokens, D hidden size, N edited rows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._triton import has_triton

from reft_cli.interventions.bank import Bank
from reft_cli.interventions.folded import Folded, FoldedLowRank
from reft_cli.models.compiling import compiled

Values = tuple[Tensor, ...]
Form = type[Folded]


class RowEditor:
    """h with h + Δ(h) at some rows. `fuse` makes it quick: kernels of our own where they apply, else compiled code."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self._functions: tuple[Callable[..., Tensor], Callable[..., Values]] = (_edited, _slopes)
        self._kernels: ModuleType | None = None

    def fuse(self, wanted: bool) -> None:
        """Run the arithmetic of the rows in few kernels, or step by step, as without a compiler.

        The kernels of models/edit_kernels.py edit h on a GPU that Triton knows, if the form is low-rank, its values are
        float32 and the rank is not in the hundreds; everything else is compiled by torch. All round at the same place.
        """
        self._functions = (compiled(_edited), compiled(_slopes)) if wanted else (_edited, _slopes)
        self._kernels = _kernels(next(self.bank.parameters()).device) if wanted else None

    def __call__(self, h: Tensor, rows: Tensor, site: int) -> Tensor:
        """h [B, T, D] with its flat rows [N] edited, as the bank's site does."""
        rows, values = rows.to(h.device), tuple(value.to(h.device) for value in self.bank.values(site))
        if self.bank.training and self.bank.dropout:
            flat = h.reshape(-1, h.shape[-1])
            before = flat.index_select(0, rows)
            after = (before + self.bank.delta_of(before, values)).to(h.dtype)
            return flat.index_copy(0, rows, after).view_as(h)
        if self._kernels is not None and self.bank.form is FoldedLowRank and self._kernels.takes(h, *values):
            by_kernels: Tensor = self._kernels.EditRows.apply(h, rows, *values)
            return by_kernels
        with torch.autocast(h.device.type, enabled=False):
            edited: Tensor = _EditRows.apply(h, rows, self.bank.form, self._functions, *values)
        return edited


class _EditRows(torch.autograd.Function):
    """Autograd would make a tensor of the size of h for each of the four steps from h to its rows and back."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  torch gives the context no public type
        h: Tensor,
        rows: Tensor,
        form: Form,
        functions: tuple[Callable[..., Tensor], Callable[..., Values]],
        *values: Tensor,
    ) -> Tensor:
        flat = h.reshape(-1, h.shape[-1])  # [B*T, D]
        before = flat.index_select(0, rows)  # [N, D]
        ctx.save_for_backward(rows, before, *values)
        ctx.form, ctx.slopes = form, functions[1]
        return flat.index_copy(0, rows, functions[0](form, before, values)).view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        rows, before, *values = ctx.saved_tensors
        flat = upstream.reshape(-1, upstream.shape[-1])
        at_rows, *at_values = ctx.slopes(ctx.form, before, flat.index_select(0, rows), tuple(values))
        below = flat.index_copy(0, rows, at_rows).view_as(upstream) if ctx.needs_input_grad[0] else None
        return below, None, None, None, *at_values


def _kernels(device: torch.device) -> ModuleType | None:
    """The kernels, if they run there; Triton is not imported elsewhere. bfloat16 wants compute capability 8."""
    if device.type != "cuda" or not has_triton() or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    from reft_cli.models import edit_kernels

    return edit_kernels


def _edited(form: Form, before: Tensor, values: Values) -> Tensor:
    """Summed in the widest type, then rounded once."""
    return (before + form.rows(before, *values)).to(before.dtype)


def _slopes(form: Form, before: Tensor, upstream: Tensor, values: Values) -> Values:
    to_rows, *to_values = form.slopes(before, upstream, *values)
    return (upstream + to_rows).to(upstream.dtype), *to_values
