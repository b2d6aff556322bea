"""What resuming puts back."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import AdamW

from reft_cli.training.state import capture_state, restore_state

CPU = torch.device("cpu")


def test_moments_and_steps_come_back_to_the_parameters_device():
    """A fused AdamW wants its count of steps where the parameter is."""
    here, elsewhere = (nn.Parameter(torch.ones(2, 3, device=device)) for device in ("cpu", "meta"))
    optimizer, other = (AdamW([parameter], fused=True) for parameter in (here, elsewhere))
    here.grad = torch.ones(2, 3)
    optimizer.step()
    kept = capture_state(optimizer, {id(here): "bank.weight"}, [CPU])
    restore_state(kept, other, {"bank.weight": elsewhere}, [CPU])
    assert {kind: tensor.device.type for kind, tensor in other.state[elsewhere].items()} == {
        "step": "meta",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }
