"""`reft tasks`: the published suites, and one of them as YAML to copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from reft_cli.cli import console, options
from reft_cli.errors import SpecError

if TYPE_CHECKING:
    from reft_cli.suites import Preset, Suite

app = typer.Typer(
    name="tasks",
    help="List the published suites, show one as YAML.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def list_suites(context: typer.Context, as_json: options.AsJson = False) -> None:
    """List the published suites, show one as YAML."""
    if context.invoked_subcommand is not None:
        return
    from reft_cli.suites import SUITES

    if as_json:
        console.result_json([_facts(suite) for suite in SUITES.values()])
        return
    rows = [[suite.name, suite.values["task.metric"], _recipes(suite), suite.about] for suite in SUITES.values()]
    console.result_table(["suite", "metric", "recipes", "what it is"], rows)
    console.say("next: task: NAME in a spec, or reft tasks show NAME")


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A suite, as `reft tasks` lists it.", metavar="NAME", show_default=False)],
    method: Annotated[str, typer.Option("--method", help="Method of the intervention.")] = "loreft",
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="One of the recipes for the method.", metavar="RECIPE")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Print a suite as a whole spec, with where each value comes from."""
    chosen = _preset(name, method, recipe)
    if as_json:
        defaults = [{"key": each.key, "value": each.value, "source": each.source} for each in chosen.defaults]
        facts = {"recipe": chosen.recipe and chosen.recipe.name, "notes": list(chosen.notes), "defaults": defaults}
        console.result_json(_facts(chosen.suite) | {"method": method} | facts)
        return
    from reft_cli.spec.suite_text import preset_yaml

    console.result(preset_yaml(chosen, method=method).rstrip("\n"))


def _preset(name: str, method: str, recipe: str | None) -> Preset:
    from reft_cli.spec.quoting import listed
    from reft_cli.spec.schema import Method
    from reft_cli.spec.task import near_suite
    from reft_cli.suites import SUITES, preset

    suite = SUITES.get(name)
    if suite is None:
        near = near_suite(name, SUITES)
        meant = f"; did you mean `{near}`?" if near else ""
        raise SpecError(f"`{name}` is no suite; `reft tasks` lists them{meant}")
    if method not in get_args(Method):
        raise SpecError(f"--method {method}: write {listed(get_args(Method))}")
    chosen = preset(suite, method=method, recipe=recipe)
    if chosen is None:
        known = [each.name for each in suite.recipes_of(method)]
        there = f"write {listed(known)}" if known else "there is none; leave it out"
        raise SpecError(f"--recipe {recipe}: {name} has no such recipe for {method}; {there}")
    return chosen


def _facts(suite: Suite) -> dict[str, Any]:
    recipes = [
        {"method": each.method, "name": each.name, "model": each.model, "source": each.source} for each in suite.recipes
    ]
    return {
        "suite": suite.name,
        "about": suite.about,
        "kind": suite.values["task.kind"],
        "metric": suite.values["task.metric"],
        "recipes": recipes,
    }


def _recipes(suite: Suite) -> str:
    """`loreft: paper, 3-epochs; direft: untied, tied`."""
    by_method: dict[str, list[str]] = {}
    for each in suite.recipes:
        by_method.setdefault(each.method, []).append(each.name)
    return "; ".join(f"{method}: {', '.join(names)}" for method, names in by_method.items())
