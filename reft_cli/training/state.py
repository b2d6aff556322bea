"""Everything that training needs besides the weights to go on exactly where it stopped, as tensors and plain JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from reft_cli.parallel.collective import rank, size

MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # what AdamW keeps of a parameter
STEP_STRIDE = 1_000_003  # a prime; dropout of neighbouring steps and ranks is not shared


@dataclass
class Progress:
    """Where a run stands; JSON beside the tensors of a checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Real tokens that went through the model."""
    seconds: float = 0.0
    """Time spent in training steps."""
    best_score: float | None = None
    best_step: int | None = None
    bad_validations: int = 0
    """Validations since the best one."""
    validation_is_due: bool = False
    """Whether a signal cut this step's validation short."""
    first_loss: float | None = None
    """Median of the first five; a loss below it is no explosion."""
    recent_losses: list[float] = field(default_factory=list)
    """Up to a hundred losses, for recognising one that exploded."""
    loss_scale: dict[str, Any] = field(default_factory=dict)
    """State of the float16 loss scaler; empty otherwise."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def capture_state(optimizer: Optimizer, names: dict[int, str], devices: Sequence[torch.device]) -> dict[str, Tensor]:
    """The optimizer's moments, by parameter name, and the random number generators' states, of every GPU in use."""
    state = {
        f"optimizer.{names[id(parameter)]}.{kind}": tensor.clone()
        for parameter, kinds in optimizer.state.items()
        for kind, tensor in kinds.items()
    }
    state["rng.cpu"] = torch.get_rng_state()
    return state | {name: torch.cuda.get_rng_state(device) for name, device in _generators(devices)}


def restore_state(
    tensors: dict[str, Tensor],
    optimizer: Optimizer,
    parameters: dict[str, torch.nn.Parameter],
    devices: Sequence[torch.device],
) -> None:
    """Put captured moments and generator states back. ValueError: they are not those of these parameters."""
    for name, parameter in parameters.items():
        prefix = f"optimizer.{name}."
        kinds = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        for kind, value in kinds.items():
            if value.shape != (torch.Size() if kind == "step" else parameter.shape) or value.dtype != torch.float32:
                raise ValueError(f"{prefix}{kind} is {list(value.shape)} of {value.dtype}, for {list(parameter.shape)}")
        if kinds and kinds.keys() != MOMENTS:  # none before a first step that float16 did not skip
            raise ValueError(f"{prefix}* are {sorted(kinds)}, not {sorted(MOMENTS)}")
        # The steps too: a fused AdamW counts them on the device.
        optimizer.state[parameter] = {kind: value.to(parameter.device, copy=True) for kind, value in kinds.items()}
    torch.set_rng_state(tensors["rng.cpu"])
    for name, device in _generators(devices):
        if name in tensors:
            torch.cuda.set_rng_state(tensors[name], device)


def _generators(devices: Sequence[torch.device]) -> list[tuple[str, torch.device]]:
    """GPUs and the names of their generators' states; a single one has none of its own."""
    gpus = [device for device in devices if device.type == "cuda"]
    return [(f"rng.cuda.{number}" if number else "rng.cuda", device) for number, device in enumerate(gpus)]


def seed_step(seed: int, step: int) -> None:
    """With several processes, seed this one's generators for a step, so that resuming needs nobody's state.

    A single process draws on from where it is.
    """
    if size() > 1:
        torch.manual_seed((seed * STEP_STRIDE + step) * size() + rank())
