"""A frozen base in four or eight bits a weight through bitsandbytes, quantised while it is read.

nf4: 4-bit normal floats in blocks of 64 whose scales are quantised again, 4.13 bits a weight (Dettmers et al., 2023,
arXiv 2305.14314). int8: a scale a row, outlier features in half precision (Dettmers et al., 2022, arXiv 2208.07339).
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from reft_cli.errors import SpecError

KINDS = ("nf4", "int8")


def quantization_config(kind: str, *, auto: type, config: PretrainedConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers is to quantise a model. What is beside the transformer, such as a head, stays as it is.

    SpecError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SpecError(f"model.quantization: {kind} needs bitsandbytes: pip install 'reft[quant]'")
    with torch.device("meta"):
        shape: Any = auto.from_config(config)  # type: ignore[attr-defined]  # every Auto class has it
    beside = [name for name, _ in shape.named_children() if name != shape.base_model_prefix]
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=beside)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=beside,
    )


def hold_no_inputs(model: nn.Module) -> None:
    """Let 8-bit layers keep nothing for the backward pass.

    bitsandbytes' own keep their inputs, for a gradient to weights that are frozen here: at the 8B shape more memory
    than eight bits save.
    """
    from bitsandbytes.nn import Linear8bitLt

    class FrozenLinear8bit(Linear8bitLt):
        def forward(self, x: Tensor) -> Tensor:
            if not (torch.is_grad_enabled() and x.requires_grad):
                return super().forward(x)
            product: Tensor = FrozenProduct.apply(x, self)
            return product

    for module in model.modules():
        if type(module) is Linear8bitLt:
            module.__class__ = FrozenLinear8bit


class FrozenProduct(torch.autograd.Function):
    """What an 8-bit layer computes of x [..., in]; the gradient to x is upstream [..., out] W, with W = CB · SCB / 127
    of its numbers CB [out, in] and their scales SCB [out], as in bitsandbytes' MatMul8bitLt.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:  # noqa: ANN401  autograd's own
        """The layer's own product; no graph is made of it here."""
        product: Tensor = layer.forward(x.detach())
        ctx.layer = layer
        return product

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        """The gradient to x alone."""
        state = ctx.layer.state
        weight = state.CB.to(upstream.dtype, copy=True).mul_(state.SCB[:, None] / 127)
        return upstream @ weight, None


def true_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a weight, which four bits are packed out of."""
    state = getattr(parameter, "quant_state", None)
    return torch.Size(state.shape) if state is not None else parameter.shape


def true_count(parameter: nn.Parameter) -> int:
    """The numbers of a weight."""
    return math.prod(true_shape(parameter))
