"""The blocks below the lowest edit: what comes out of them never changes, so it can be kept and put in again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from reft_cli.models.blocks import Blocks, hidden_output
from reft_cli.models.sites import Site


class FrozenBlocks:
    """The blocks that no edit changes: those below the lowest edited one, and itself if only its output is edited."""

    def __init__(self, blocks: Blocks, sites: Sequence[Site]) -> None:
        lowest = min(site.layer for site in sites)
        at_output = all(site.component == "block_output" for site in sites if site.layer == lowest)
        self.modules = blocks.modules[: lowest + at_output]
        self._in_tuple = False

    @contextmanager
    def kept(self) -> Iterator[list[Tensor]]:
        """Inside, each forward pass appends what comes out of the last of them, [B, T, D], before any edit."""
        found: list[Tensor] = []

        def keep(_: nn.Module, __: object, output: object) -> None:
            self._in_tuple = isinstance(output, tuple)
            found.append(hidden_output(output).detach())

        with self.modules[-1].register_forward_hook(keep, prepend=True):
            yield found

    @contextmanager
    def replaced(self, h: Tensor) -> Iterator[None]:
        """Inside, they do not run: h [B, T, D] comes out of the last of them. `kept` has to have run before."""
        before = [(module, module.__dict__.get("forward")) for module in self.modules]
        for module in self.modules:
            module.forward = _giving((h,) if self._in_tuple else h)
        try:
            yield
        finally:
            for module, forward in before:
                del module.forward
                if forward is not None:  # compiled
                    module.forward = forward


def _giving(output: object) -> Callable[..., object]:
    return lambda *_, **__: output
