"""What a suite is: published defaults for keys of a spec, each with where it comes from. Plain values, no YAML.

Keys are dotted (`train.learning_rate`). A suite has what every run of it shares (data, prompt, scoring); a recipe has
the hyperparameters that were published for one method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Values = Mapping[str, Any]
# Methods without recipes of their own, and the one that they are nearest to.
NEAREST = {"noreft": "loreft", "consreft": "loreft", "lobireft": "loreft", "direft_orthogonal": "direft"}
PUBLISHED_WITH = "loreft"  # where a method has neither a recipe nor a relative: its training, not its edit


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one published run."""

    method: str
    name: str
    model: str
    """The base model that they were published for; several are told apart by commas."""
    values: Values
    source: str
    """Where they come from."""
    notes: tuple[str, ...] = ()
    """What was published otherwise, or cannot be known from what was published."""


@dataclass(frozen=True)
class Suite:
    """A published task: its data, prompt and scoring, and the recipes for it."""

    name: str
    about: str
    values: Values
    sources: Mapping[str, str]
    """Where the values come from, by the beginning of their keys."""
    recipes: tuple[Recipe, ...]
    notes: tuple[str, ...] = ()

    def source_of(self, key: str) -> str:
        """Where a value of the suite itself comes from."""
        fitting = [prefix for prefix in self.sources if key == prefix or key.startswith(prefix + ".")]
        return self.sources[max(fitting, key=len)]

    def recipes_of(self, method: str) -> tuple[Recipe, ...]:
        """The recipes that a run with this method can follow: its own, or those of its nearest relative."""
        own = tuple(each for each in self.recipes if each.method == method)
        return own or tuple(each for each in self.recipes if each.method == NEAREST.get(method))


@dataclass(frozen=True)
class Default:
    """One value that a suite brings."""

    key: str
    value: Any
    source: str


@dataclass(frozen=True)
class Preset:
    """A suite with the recipe that was chosen: all that lies below a user's spec."""

    suite: Suite
    recipe: Recipe | None
    defaults: tuple[Default, ...]
    notes: tuple[str, ...]

    def tree(self) -> dict[str, Any]:
        """The values as nested mappings."""
        root: dict[str, Any] = {}
        for default in self.defaults:
            *above, last = default.key.split(".")
            section = root
            for part in above:
                section = section.setdefault(part, {})
            section[last] = default.value
        return root


def preset(suite: Suite, *, method: str, recipe: str | None = None) -> Preset | None:
    """What a suite brings for a method; None if it has no recipe of that name."""
    known = suite.recipes_of(method)
    if not known:
        return _of_another_method(suite, method) if recipe is None else None
    chosen = next((each for each in known if recipe in (None, each.name)), None)
    if chosen is None:
        return None
    source = chosen.source if chosen.method == method else f"{chosen.source}; published for {chosen.method}"
    defaults = {key: Default(key, value, suite.source_of(key)) for key, value in suite.values.items()}
    defaults |= {key: Default(key, value, source) for key, value in chosen.values.items()}
    if recipe is None:
        defaults["task.recipe"] = Default("task.recipe", chosen.name, f"the first for {method}")
    return Preset(suite, chosen, tuple(defaults.values()), (*suite.notes, *chosen.notes))


def _of_another_method(suite: Suite, method: str) -> Preset:
    """Data, prompt and scoring, and the training that was published for LoReFT."""
    (first, *_) = suite.recipes_of(PUBLISHED_WITH)
    defaults = [Default(key, value, suite.source_of(key)) for key, value in suite.values.items()]
    defaults += [
        Default(key, value, f"{first.source}; published for {first.method}")
        for key, value in first.values.items()
        if key.startswith("train.")
    ]
    note = f"nothing is published for {method} on this suite: data and training are those of {first.method}"
    return Preset(suite, None, tuple(defaults), (*suite.notes, note))
