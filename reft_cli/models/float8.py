"""A frozen base in float8: linear layers of the blocks with weights of one byte, multiplied at twice bfloat16's rate.

Scales go by row: one for each output of a weight, one for each token of an activation or a gradient, so that an outlier
costs precision in its own row only. Products are summed in float32 and come out in the type of the activations.

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reft_cli.errors import ModelError
from reft_cli.models.blocks import find_blocks

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
SMALLEST = 1e-12  # of a row's largest number; rows of zeros have a scale too
MULTIPLE = 16  # of a layer's inputs and outputs, as float8 matrix units take them
OLDEST_GPU = (8, 9)
PIECE = 2**20  # numbers of a weight that are quantised at once


def why_no_float8(device: torch.device) -> str | None:
    """None if this device multiplies float8, else the reason."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return f"{torch.cuda.get_device_name(device)} has no float8; that takes compute capability 8.9 (Ada, Hopper)"
    return f"there is no float8 on {device.type}" if device.type not in ("cuda", "cpu") else None


def to_float8(model: nn.Module, device: torch.device | None = None) -> int:
    """Turn the blocks' linear layers into float8, in place and one by one; returns how many. ModelError: none.

    Each is moved to `device` for that, which so never holds more than one wide layer; the rest stays where it is.
    """
    done = 0
    for block in find_blocks(model).modules:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and not (child.in_features % MULTIPLE or child.out_features % MULTIPLE):
                    setattr(parent, name, Float8Linear(child.to(device)))
                    done += 1
    if not done:
        raise ModelError(
            f"model.quantization: {type(model).__name__} has no linear layers in its blocks that float8 takes "
            f"(inputs and outputs in multiples of {MULTIPLE}); remove it"
        )
    return done


class Float8Linear(nn.Module):
    """x Wᵀ + bias with W in float8: [N, I] to [N, O]."""

    scale: Tensor
    turned: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = _quantize_slowly(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)  # [O, I]
        self.register_buffer("scale", scale, persistent=False)  # [O, 1]
        self.register_buffer("turned", None, persistent=False)  # [I, O], columns together, as matrix units want it
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """The product in the type of x."""
        flat = x.reshape(-1, self.in_features)
        product = _multiply(flat, self.weight, self.scale, self.weight.t() if self.turned is None else self.turned)
        return (product if self.bias is None else product + self.bias).view(*x.shape[:-1], self.out_features)

    def train(self, mode: bool = True) -> Float8Linear:
        """For training a turned copy is kept: turning a weight takes as long as multiplying by it."""
        if mode and self.turned is None:
            self.turned = self.weight.detach().t().contiguous()
        return super().train(mode)

    def extra_repr(self) -> str:
        """The shape, for print()."""
        return f"in_features={self.in_features}, out_features={self.out_features}, float8"


class _Product(torch.autograd.Function):
    """The gradient is a float8 product too: the weight's scales, being of its outputs, go into the gradient first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, turned: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(turned, scale)
        ctx.kind = x.dtype
        small, its_scale = quantize_rows(x)
        return _product(small, weight.t(), its_scale, scale.t(), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        turned, scale = ctx.saved_tensors
        small, its_scale = quantize_rows(upstream.float() * scale.t())
        columns = scale.new_ones(1, turned.shape[0])
        return _product(small, turned.contiguous().t(), its_scale, columns, ctx.kind), None, None, None


# A compiler takes it as it is: torch 2.11 cannot look into its backward pass.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _multiply(x: Tensor, weight: Tensor, scale: Tensor, turned: Tensor) -> Tensor:
    product: Tensor = _Product.apply(x, weight, scale, turned)
    return product


def quantize_rows(wide: Tensor) -> tuple[Tensor, Tensor]:
    """(float8 numbers [N, I], scales [N, 1] in float32): numbers × scales is `wide` to three significant bits."""
    wide = wide.float()
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return (wide / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


def _quantize_slowly(wide: Tensor) -> tuple[Tensor, Tensor]:
    """The same, some rows at a time, so that it takes little memory besides."""
    pieces = wide.split(max(1, PIECE // wide.shape[1]))
    small, scale = torch.empty_like(wide, dtype=FLOAT8), wide.new_empty(len(wide), 1, dtype=torch.float32)
    for piece, *to in zip(pieces, small.split(len(pieces[0])), scale.split(len(pieces[0])), strict=True):
        for there, made in zip(to, quantize_rows(piece), strict=True):
            there.copy_(made)
    return small, scale


def _product(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor, kind: torch.dtype) -> Tensor:
    """left [N, K] × right [K, M], with a scale for each row and column."""
    half = kind if kind != torch.float32 else torch.bfloat16  # what the matrix units give
    product: Tensor = torch._scaled_mm(
        left, right, scale_a=rows, scale_b=columns.contiguous(), out_dtype=half, use_fast_accum=True
    )
    return product.to(kind)
