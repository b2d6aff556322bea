"""What resuming puts back."""

from __future__ import annotations

import pytest
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


def stepped(parameter: nn.Parameter, optimizer: AdamW) -> torch.Tensor:
    parameter.grad = torch.arange(6.0).view(2, 3) + torch.rand(1)
    optimizer.step()
    return parameter.detach().clone()


def test_what_is_put_back_goes_on_alike_and_is_a_copy():
    """Also what is captured: the steps that follow do not reach it."""
    one = nn.Parameter(torch.ones(2, 3))
    optimizer = AdamW([one], lr=0.1, fused=True)
    for _ in range(3):
        stepped(one, optimizer)
    kept = capture_state(optimizer, {id(one): "bank.weight"}, [CPU])
    before = {name: tensor.clone() for name, tensor in kept.items()}
    other = nn.Parameter(one.detach().clone())
    wanted = stepped(one, optimizer)
    resumed = AdamW([other], lr=0.1, fused=True)
    restore_state(kept, resumed, {"bank.weight": other}, [CPU])
    assert torch.equal(stepped(other, resumed), wanted)
    assert kept.keys() == before.keys() and all(torch.equal(kept[name], before[name]) for name in kept)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"exp_avg": torch.zeros(3, 2)}, r"exp_avg is \[3, 2\] of torch.float32, for \[2, 3\]"),
        ({"step": torch.zeros(2, 3)}, r"step is \[2, 3\] of torch.float32"),
        ({"exp_avg_sq": torch.zeros(2, 3).half()}, r"exp_avg_sq is \[2, 3\] of torch.float16"),
        ({"exp_avg_sq": None}, r"\* are \['exp_avg', 'step'\], not \['exp_avg', 'exp_avg_sq', 'step'\]"),
    ],
)
def test_moments_of_another_parameter_are_refused(changed: dict[str, torch.Tensor | None], said: str):
    moments = {"step": torch.ones(()), "exp_avg": torch.zeros(2, 3), "exp_avg_sq": torch.zeros(2, 3)} | changed
    kept = {f"optimizer.bank.weight.{kind}": each for kind, each in moments.items() if each is not None}
    parameter = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match=rf"^optimizer\.bank\.weight\.{said}"):
        restore_state(kept, AdamW([parameter]), {"bank.weight": parameter}, [CPU])
