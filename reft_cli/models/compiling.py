"""Compiles the forward passes of a model's blocks, once for all blocks, and leaves hooks where they are.

What is compiled is `module.forward`, below the hooks of the module itself. A block in which a module is hooked is
compiled in parts, so that no compiled piece contains a hook: with hooks inside, every block would be a program of its
own, and a whole model takes minutes where one block takes seconds.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils._triton import has_triton

Given = ParamSpec("Given")
Made = TypeVar("Made")
Options = dict[str, str | int | bool | Callable[..., object]]  # torch's own type
COMPILERS = ("cc", "gcc", "clang", "g++", "clang++")
MOST_PROGRAMS = 64  # versions of one function, say for edited and unedited blocks; beyond it torch would not compile


def compilable_parts(block: nn.Module, hooked: Collection[nn.Module]) -> list[nn.Module]:
    """The largest modules of a block that contain no hooked module; one that is hooked itself may be among them."""
    if not any(module in hooked for module in block.modules() if module is not block):
        return [block]
    children = [child for child in block.children() if any(True for _ in child.parameters())]
    return [part for child in children for part in compilable_parts(child, hooked)]


class CompiledParts:
    """Modules that run compiled while this is on, for any number of tokens; what was compiled is kept in between."""

    def __init__(self, modules: Sequence[nn.Module], *, options: Options | None = None) -> None:
        self._forwards = [(each, torch.compile(each.forward, dynamic=True, options=options)) for each in modules]

    @contextmanager
    def running(self, *, forgiving: bool = False) -> Iterator[None]:
        """`forgiving`: what torch cannot compile runs as it stands, and torch says so. Otherwise it is its error."""
        settings = torch._dynamo.config.patch(recompile_limit=MOST_PROGRAMS, suppress_errors=forgiving)
        done: list[nn.Module] = []
        try:
            with settings, warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # dynamo looks at inputs
                for module, forward in self._forwards:
                    module.forward = forward
                    done.append(module)
                yield
        finally:
            for module in done:
                del module.forward  # the class's own is seen again


@contextmanager
def compiling(modules: Sequence[nn.Module], *, forgiving: bool = False) -> Iterator[None]:
    """Inside, these modules run compiled; `forgiving` as above."""
    with CompiledParts(modules).running(forgiving=forgiving):
        yield


def compiled(function: Callable[Given, Made], *, options: Options | None = None) -> Callable[Given, Made]:
    """A function of tensors, compiled for any number of rows."""
    return torch.compile(function, dynamic=True, options=options)


def why_not_compiled(device: torch.device) -> str | None:
    """None if torch can compile for a device here, else the reason."""
    if device.type not in ("cuda", "cpu"):
        return f"torch.compile is not tried on {device.type}"
    if not any(map(shutil.which, COMPILERS)):
        return "there is no C compiler on the path"
    if device.type == "cuda" and not has_triton():
        return "Triton is not installed"
    return None


def compile_seconds() -> float:
    """What compiling has taken in this process so far."""
    from torch._dynamo.utils import calculate_time_spent  # a second to import, for nothing where nothing is compiled

    return float(calculate_time_spent()["total_wall_time"])
