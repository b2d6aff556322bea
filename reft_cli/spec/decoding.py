"""`--set generation.key=value` of commands that answer with a trained run: read and checked as in a spec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reft_cli.errors import Problem, SpecError
from reft_cli.spec.overrides import flag_name, override
from reft_cli.spec.problems import validate
from reft_cli.spec.schema import GenerationSpec
from reft_cli.spec.yaml_tree import Node, Origin

SECTION = "generation"


def generation_keys(flags: Sequence[str]) -> dict[str, Any]:
    """The keys of `generation` that these flags give, with their values. SpecError: all that is wrong with them."""
    problems: list[Problem] = []
    given = [flag.partition("=")[0].strip().partition(".") for flag in flags]
    for flag, (section, _, key) in zip(flags, given, strict=True):
        if section != SECTION or not key:
            hint = f"write --set {SECTION}.{flag}" if section in GenerationSpec.model_fields else None
            message = f"a trained run takes keys of {SECTION} only, such as {SECTION}.beams=4"
            problems.append(Origin(flag=flag_name(flag)).problem(message, hint=hint))
    nowhere = Origin()
    warm = Node({"temperature": Node(1.0, nowhere, nowhere, text="1.0")}, nowhere, nowhere)  # the run's is not known
    base = Node({"model": Node("any", nowhere, nowhere, text="any"), SECTION: warm}, nowhere, nowhere)
    spec = None if problems else validate(override(base, flags, problems=problems), problems=problems)
    if spec is None:
        raise SpecError(*problems)
    return {key: getattr(spec.generation, key) for _, _, key in given}
