"""AdamW over a bank's stacked parameters and the head's, decaying only what may be decayed."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import AdamW

from reft_cli.models.intervened import IntervenedModel


def trainable_parameters(model: IntervenedModel) -> dict[str, nn.Parameter]:
    """The bank's and the head's parameters, under the names that a checkpoint gives them."""
    bank = {f"bank.{name}": parameter for name, parameter in model.bank.named_parameters()}
    return bank | {f"head.{name}": parameter for name, parameter in model.head_parameters().items()}


def build_optimizer(model: IntervenedModel, *, learning_rate: float, weight_decay: float) -> AdamW:
    """AdamW (β 0.9, 0.999; ε 1e-8). Orthonormal rows, biases and RED are never decayed."""
    spared = {f"bank.{name}" for name in model.bank.undecayed}
    named = trainable_parameters(model)
    spared |= {name for name, parameter in named.items() if name.startswith("head.") and parameter.ndim < 2}
    groups = [
        {"params": [p for name, p in named.items() if name not in spared], "weight_decay": weight_decay},
        {"params": [p for name, p in named.items() if name in spared], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=learning_rate, fused=True)


def all_gradients(model: IntervenedModel) -> list[torch.Tensor]:
    """Gradients of everything trainable; a parameter that no row reached has zeros."""
    gradients = []
    for parameter in trainable_parameters(model).values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    return gradients
