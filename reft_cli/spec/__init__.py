"""The YAML spec: its schema, and the loader that reads, layers and checks it."""

from reft_cli.spec.editor import json_schema
from reft_cli.spec.load import LoadedSpec, load_spec, resolved_yaml
from reft_cli.spec.schema import Spec

__all__ = ["LoadedSpec", "Spec", "json_schema", "load_spec", "resolved_yaml"]
