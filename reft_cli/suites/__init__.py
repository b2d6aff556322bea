"""Published tasks by name: data, prompt, scoring and hyperparameters, as defaults that lie below a user's spec."""

from reft_cli.suites import arithmetic, commonsense, glue, instruct, pairs
from reft_cli.suites.recipe import Default, Preset, Recipe, Suite, preset

SUITES: dict[str, Suite] = {
    suite.name: suite for room in (commonsense, arithmetic, instruct, pairs, glue) for suite in room.SUITES
}

__all__ = ["SUITES", "Default", "Preset", "Recipe", "Suite", "preset"]
