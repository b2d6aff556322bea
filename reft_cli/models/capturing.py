"""CUDA graphs: what a function starts on the GPU, recorded once and started again as a whole.

What is recorded must not depend on values that the host reads, and finds and leaves everything at the same addresses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class NotCaptured(Exception):
    """This cannot be recorded, say because a router looks at values on the host; the message is the GPU's reason."""


def run_aside(run: Callable[[], object]) -> None:
    """Run on another stream, as libraries want it before they are recorded."""
    now, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(now)
    with torch.cuda.stream(side):
        run()
    now.wait_stream(side)


def capture(
    run: Callable[[], object], *, pool: tuple[int, int] | None = None, stream: torch.cuda.Stream | None = None
) -> torch.cuda.CUDAGraph:
    """A graph of what `run` starts, in the memory of `pool`; raises NotCaptured, and never hides that memory is out."""
    graph, now = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    # Other threads may pin memory meanwhile.
    recording = torch.cuda.graph(
        graph,
        pool=pool,  # type: ignore[arg-type]  # torch's own name for such a pair
        stream=stream,
        capture_error_mode="thread_local",
    )
    try:
        with recording:
            run()
    except RuntimeError as error:
        torch.cuda.set_stream(now)  # a recording that fails leaves its own behind
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise NotCaptured(first_reason(error)) from error
    return graph


def first_reason(error: RuntimeError) -> str:
    """First line of the error that began it: ending a recording that has failed raises another, which says nothing."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return str(error).splitlines()[0]
