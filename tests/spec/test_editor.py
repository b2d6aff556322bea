"""The JSON Schema that editors use."""

from __future__ import annotations

import json
import re

from reft_cli.spec import json_schema


def test_dialect_titles_and_descriptions():
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["required"] == ["model"]
    assert schema["additionalProperties"] is False
    for name, section in schema["$defs"].items():
        assert section["description"]
        for key, field in section.get("properties", {}).items():
            assert "description" in field, (name, key)
            assert "\n" not in field["description"]
    assert schema["$defs"]["TrainSpec"]["properties"]["learning_rate"]["description"] == "Peak of the schedule."
    json.dumps(schema, allow_nan=False)


def test_model_is_a_string_or_a_mapping():
    assert json_schema()["properties"]["model"]["anyOf"] == [{"type": "string"}, {"$ref": "#/$defs/ModelSpec"}]


def test_what_is_no_text_can_be_a_reference():
    schema = json_schema()
    defs = schema["$defs"]
    reference = {"$ref": "#/$defs/env"}
    for section, key in (
        ("TrainSpec", "seed"),
        ("TrainSpec", "max_steps"),
        ("TrainSpec", "micro_batch_size"),
        ("TrainSpec", "deterministic"),
        ("InterventionSpec", "method"),
        ("ModelSpec", "device"),
        ("CheckpointSpec", "every"),
    ):
        field = defs[section]["properties"][key]
        assert reference in field["anyOf"], key
        assert "default" in field
        assert "description" in field
    for section, key in (("ModelSpec", "revision"), ("InterventionSpec", "layers"), ("DataSpec", "train")):
        assert reference not in defs[section]["properties"][key]["anyOf"]
    assert re.fullmatch(defs["env"]["pattern"], "${env:REFT_SEED:-42}")
    assert not re.fullmatch(defs["env"]["pattern"], "env:REFT_SEED")


def test_references_resolve():
    schema = json_schema()
    used = set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(schema)))
    assert used == set(schema["$defs"])
