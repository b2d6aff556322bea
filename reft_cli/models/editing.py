"""Edits rows of hidden states, forward and backward, at the cost of the rows and one copy of the rest.

Shapes: B batch, T tokens, D hidden size, N edited rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reft_cli.interventions.bank import Bank
from reft_cli.interventions.folded import Folded
from reft_cli.models.compiling import compiled

Values = tuple[Tensor, ...]
Form = type[Folded]


class RowEditor:
    """h with h + Δ(h) at some rows. `fused` compiles what is computed for the rows."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self._functions: tuple[Callable[..., Tensor], Callable[..., Values]] = (_edited, _slopes)

    def fuse(self, wanted: bool) -> None:
        """Compile the arithmetic of the rows, or run it as it stands."""
        self._functions = (compiled(_edited), compiled(_slopes)) if wanted else (_edited, _slopes)

    def __call__(self, h: Tensor, rows: Tensor, site: int) -> Tensor:
        """h [B, T, D] with its flat rows [N] edited, as the bank's site does."""
        values = self.bank.values(site)
        if self.bank.training and self.bank.dropout:
            flat = h.reshape(-1, h.shape[-1])
            before = flat.index_select(0, rows)
            after = (before + self.bank.delta_of(before, values)).to(h.dtype)
            return flat.index_copy(0, rows, after).view_as(h)
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


def _edited(form: Form, before: Tensor, values: Values) -> Tensor:
    """Summed in the widest type, then rounded once."""
    return (before + form.rows(before, *values)).to(before.dtype)


def _slopes(form: Form, before: Tensor, upstream: Tensor, values: Values) -> Values:
    to_rows, *to_values = form.slopes(before, upstream, *values)
    return (upstream + to_rows).to(upstream.dtype), *to_values
