"""Compiles the forward passes of a model's blocks, once for all blocks, and leaves hooks where they are.

What is compiled is `module.forward`, below the hooks of the module itself. A block in which a module is hooked is
compiled in parts, so that no compiled piece contains a hook: with hooks inside, every block would be a program of its
own, and a whole model takes minutes where one block takes seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import nn

Given = ParamSpec("Given")
Made = TypeVar("Made")
MOST_PROGRAMS = 64  # versions of one function, say for edited and unedited blocks; beyond it torch would not compile


def compilable_parts(block: nn.Module, hooked: Collection[nn.Module]) -> list[nn.Module]:
    """The largest modules of a block that contain no hooked module; one that is hooked itself may be among them."""
    if not any(module in hooked for module in block.modules() if module is not block):
        return [block]
    children = [child for child in block.children() if any(True for _ in child.parameters())]
    return [part for child in children for part in compilable_parts(child, hooked)]


@contextmanager
def compiling(modules: Sequence[nn.Module], *, forgiving: bool = False) -> Iterator[None]:
    """Inside, these modules run compiled, for any number of tokens.

    `forgiving`: what torch cannot compile runs as it stands, and torch says so. Otherwise it is its error.
    """
    done: list[nn.Module] = []
    settings = torch._dynamo.config.patch(recompile_limit=MOST_PROGRAMS, suppress_errors=forgiving)
    try:
        with settings, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # dynamo looks at every input
            for module in modules:
                module.forward = torch.compile(module.forward, dynamic=True)
                done.append(module)
            yield
    finally:
        for module in done:
            del module.forward  # the class's own is seen again


def compiled(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """A function of tensors, compiled for any number of rows."""
    return torch.compile(function, dynamic=True)


def compile_seconds() -> float:
    """What compiling has taken in this process so far."""
    from torch._dynamo.utils import calculate_time_spent  # a second to import, for nothing where nothing is compiled

    return float(calculate_time_spent()["total_wall_time"])
