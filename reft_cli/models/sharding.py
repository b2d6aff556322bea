"""A frozen base whose blocks are spread over the processes: each holds a part and gathers a block to run it (FSDP2).

Only the blocks are sharded. What is before and after them, and everything that trains, is whole in every process, so
that gradients of what trains are added up as without sharding, and a checkpoint is the same.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from reft_cli.errors import SpecError
from reft_cli.models.blocks import find_blocks
from reft_cli.parallel.collective import size


def shard_blocks(model: nn.Module, device: torch.device) -> None:
    """Spread the blocks of a model on the CPU over the processes' devices, one by one; the rest stays.

    SpecError: there is one process.
    """
    if size() == 1:
        raise SpecError("parallel.shard: there is one process, so nothing to spread the base over; leave it out")
    mesh = init_device_mesh(device.type, (size(),))
    blocks = find_blocks(model).modules
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    inside = {parameter for block in blocks for parameter in block.parameters()}
    outside = {parameter for parameter in model.parameters() if parameter not in inside}
    root: nn.Module = model.base_model  # type: ignore[assignment]  # every transformer of transformers has it
    fully_shard(root, mesh=mesh, ignored_params=outside)  # so that blocks are gathered ahead of their turn


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's blocks are spread over the processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
