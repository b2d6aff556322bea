"""`reft schema`: the spec's JSON Schema, for editors."""

from __future__ import annotations

import json

from reft_cli.cli import console, options


def schema(as_json: options.AsJson = False) -> None:
    """Print the JSON Schema of a spec, for editors."""
    from reft_cli.spec import json_schema

    console.result(json.dumps(json_schema(), indent=None if as_json else 2))
