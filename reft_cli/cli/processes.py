"""Commands that are carried out by several processes: this one becomes their parent, unless it is one of them."""

from __future__ import annotations

from collections.abc import Callable

from reft_cli.cli import console
from reft_cli.cli.importing import importing
from reft_cli.errors import ProcessLost
from reft_cli.parallel import launch
from reft_cli.parallel.launch import Outcome
from reft_cli.parallel.world import is_launched


def as_several(processes: int | str, *, device: str, before: Callable[[], None] = lambda: None) -> Outcome | None:
    """How this command line went in processes of their own, with what nobody has heard said; None: it is to run here.

    `before` is called before any of them is started.
    """
    with importing():  # GPUs are counted by torch
        count = 1 if is_launched() else launch.count(processes, device=device)
    if count == 1:
        return None
    before()
    outcome = launch.run(console.settings.words, count)
    if outcome.said:
        console.complain(outcome.said)
    if outcome.lost:
        console.fail(ProcessLost(outcome.lost, exit_code=outcome.code))
    return outcome
