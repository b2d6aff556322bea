"""A suite as YAML to copy: a whole spec, every value with where it comes from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from reft_cli.spec.quoting import yaml_inline, yaml_text
from reft_cli.spec.resolved import INDENT, aligned
from reft_cli.suites import Preset

WIDTH = 110


def preset_yaml(preset: Preset, *, method: str) -> str:
    """A spec of all that the suite brings for a method; it needs no suite any more."""
    model = (preset.recipe or preset.suite.recipes[0]).model
    tree = {"model": {"name": model.split(", ")[0]}, "intervention": {"method": method}} | preset.tree()
    tree["model"] = {"name": model.split(", ")[0], **preset.tree().get("model", {})}
    tree["intervention"] = {"method": method, **preset.tree().get("intervention", {})}
    tree["task"] = {key: value for key, value in tree["task"].items() if key != "recipe"}
    sources = {default.key: default.source for default in preset.defaults}
    sources |= {"model.name": f"published for {model}", "intervention.method": "reft tasks show --method"}
    return "\n".join(_heading(preset, method)) + "\n" + aligned(list(_rows(tree, sources, ())))


def _heading(preset: Preset, method: str) -> Iterator[str]:
    suite, recipe = preset.suite, preset.recipe
    yield f"# {suite.name}: {suite.about}"
    if recipe is not None:
        others = [each.name for each in suite.recipes_of(method) if each is not recipe]
        more = f"; there is {', '.join(others)} too (--recipe)" if others else ""
        yield f"# recipe {recipe.name} for {recipe.method}{more}"
    for note in preset.notes:
        yield from textwrap.wrap(note, WIDTH, initial_indent="# - ", subsequent_indent="#   ")


def _rows(tree: Mapping[str, Any], sources: Mapping[str, str], path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(line, comment); a mapping has a line of its own, each item of a list of mappings too."""
    margin = INDENT * len(path)
    for key, value in tree.items():
        here, name = (*path, key), yaml_text(key)
        source = sources.get(".".join(here), "")
        if isinstance(value, Mapping):
            yield f"{margin}{name}:", source
            yield from _rows(value, sources, here)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{margin}{name}:", source
            yield from ((f"{margin}{INDENT}- {yaml_inline(item)}", "") for item in value)
        else:
            yield f"{margin}{name}: {yaml_inline(value)}", source
