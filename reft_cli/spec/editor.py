"""The spec as JSON Schema (draft 2020-12), for editors that complete and underline."""

from __future__ import annotations

from typing import Any

from reft_cli.spec.schema import Spec

DIALECT = "https://json-schema.org/draft/2020-12/schema"
REFERENCE = {
    "type": "string",
    "pattern": r"^\$\{env:[A-Za-z_][A-Za-z0-9_]*(:-[^}]*)?\}$",
    "description": "The value of an environment variable: ${env:NAME} or ${env:NAME:-default}.",
}
TYPED = {"integer", "number", "boolean"}
CLOSING = {"enum", "const", "pattern"}  # keywords of text that cannot be anything


def json_schema() -> dict[str, Any]:
    """The schema of a spec file; numbers and switches may also be `${env:NAME}`."""
    schema = Spec.model_json_schema()
    definitions = {**schema.pop("$defs"), "env": REFERENCE}
    for section in (schema, *definitions.values()):
        section["description"] = " ".join(section["description"].split())
        for name, field in section.get("properties", {}).items():
            section["properties"][name] = _field(field)
    return {"$schema": DIALECT, **schema, "title": "reft spec", "$defs": definitions}


def _field(field: dict[str, Any]) -> dict[str, Any]:
    """A property without what editors have no use for (titles, whole sections as defaults), open to `${env:…}`."""
    field = {key: value for key, value in field.items() if key != "title"}
    if "description" in field:
        field["description"] = " ".join(field["description"].split())
    if isinstance(field.get("default"), dict):
        del field["default"]
    found = field.get("anyOf") or [field]
    if any(map(_is_closed, found)) and not any(map(_is_open_text, found)):
        about: dict[str, Any] = {key: field.pop(key) for key in ("default", "description") if key in field}
        return {"anyOf": [*(field.get("anyOf") or [field]), {"$ref": "#/$defs/env"}], **about}
    return field


def _is_closed(branch: dict[str, Any]) -> bool:
    return branch.get("type") in TYPED or not CLOSING.isdisjoint(branch)


def _is_open_text(branch: dict[str, Any]) -> bool:
    return branch.get("type") == "string" and CLOSING.isdisjoint(branch)
