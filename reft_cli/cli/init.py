"""`reft init`: a commented spec that trains as it stands, with a JSON Schema beside it for the editor.

The comments are the schema's own descriptions, so they cannot drift from what the loader accepts.
"""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from reft_cli.cli import console, options
from reft_cli.errors import SpecError, reason_of

SCHEMA_FILE = "reft.schema.json"
WIDTH = 110
SMALL_MODEL = "bundled:tiny-llama"
BUNDLED = "bundled:reviews"
# How to train. The bundled model: what it was found to need, as quickstart.yaml and classification.yaml in configs have
# it; others, which are larger: the paper's setting for models of billions of parameters.
WRITTEN = {"epochs": 8, "learning_rate": 0.01, "warmup_ratio": 0.1, "global_batch_size": 16}
OTHERWISE = {"epochs": 6, "learning_rate": 0.005, "warmup_ratio": 0.1, "global_batch_size": 32}
LARGE = {"epochs": 6, "learning_rate": 0.0009, "warmup_ratio": 0.1, "global_batch_size": 32}
SPLITS = ("train", "validation", "test")


class Task(StrEnum):
    """Kinds of task that there is a starting spec for."""

    causal_lm = "causal_lm"
    preference = "preference"
    reward = "reward"
    classification = "classification"
    regression = "regression"


def init(
    task: Annotated[Task, typer.Argument(help="Kind of task.", metavar="TASK")] = Task.causal_lm,
    model: Annotated[str, typer.Option("--model", help="Hub id, local folder, or bundled:NAME.")] = SMALL_MODEL,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")] = Path("spec.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace files that are in the way.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a commented spec that trains as it stands."""
    files = {output: spec_text(task, model=model, path=output), output.parent / SCHEMA_FILE: _schema_text()}
    files |= {output.parent / name: text for name, text in _data_of(task).items()}
    present = [path for path, text in files.items() if path.exists() and not _holds(path, text)]
    if present and not force:
        raise SpecError(f"{present[0]} exists; replace it with --force, or write another file with -o")
    for path, text in files.items():
        _write(path, text)
    if as_json:
        console.result_json({"spec": str(output), "files": [str(path) for path in files]})
    else:
        console.result(str(output))
    spec = shlex.quote(str(output))
    console.say(f"next: reft check {spec}, then reft train {spec}")


def spec_text(task: Task, *, model: str, path: Path) -> str:
    """The spec of a kind of task, with the schema's description above every key."""
    from reft_cli.spec import json_schema

    opening = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# reft check {path}    what it would do",
        f"# reft train {path}    do it",
    ]
    schema = json_schema()
    return "\n".join([*opening, *_section(_values(task, model), schema, schema, depth=0)]) + "\n"


def _values(task: Task, model: str) -> dict[str, Any]:
    """The keys that a first spec sets; everything else is left to the defaults."""
    small, written = model == SMALL_MODEL, task in (Task.causal_lm, Task.preference)
    data: dict[str, Any] = {split: f"{BUNDLED}/{split}" for split in SPLITS}
    if task is Task.causal_lm:
        data["template"] = {"prompt": "Review: {text}\nSentiment:", "completion": " {label}"}
    elif task in ROWS:
        data = {split: ROWS[task][0].format(split) for split in SPLITS}
    return {
        "model": model,
        "intervention": {"method": "loreft", "layers": "all", "positions": "prompt" if small else "f7+l7", "rank": 4},
        "task": {"kind": task.value},
        "data": data,
        "train": (WRITTEN if task is Task.causal_lm else OTHERWISE) if small else LARGE,
    } | ({"generation": {"max_new_tokens": 4}} if written else {})


def _section(
    values: Mapping[str, Any], schema: Mapping[str, Any], whole: Mapping[str, Any], *, depth: int
) -> Iterator[str]:
    """Lines of YAML for one mapping."""
    from reft_cli.spec.quoting import yaml_inline

    indent = "  " * depth
    for key, value in values.items():
        facts = _resolve(schema["properties"][key], whole)
        if depth == 0:
            yield ""
        yield from textwrap.wrap(_comment(facts), WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if isinstance(value, Mapping) and "properties" in facts:
            yield f"{indent}{key}:"
            yield from _section(value, facts, whole, depth=depth + 1)
        else:
            yield f"{indent}{key}: {yaml_inline(value)}"


def _resolve(facts: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """A property with what it refers to; of several types, the mapping's keys and everyone's choices."""
    found = dict(facts)
    for part in (facts, *facts.get("anyOf", ()), *facts.get("allOf", ())):
        if "$ref" in part:
            found = whole["$defs"][part["$ref"].rpartition("/")[2]] | found
        elif "enum" in part:
            found.setdefault("enum", part["enum"])
    return found


def _comment(facts: Mapping[str, Any]) -> str:
    description = " ".join(str(facts.get("description", "")).split())
    choices = [str(choice) for choice in facts.get("enum", ()) if choice is not None]
    named = all(choice in description for choice in choices)
    return description if named else f"{description} One of {', '.join(choices)}."


def _schema_text() -> str:
    from reft_cli.spec import json_schema

    return json.dumps(json_schema(), indent=2) + "\n"


def _numbered(row: Mapping[str, str]) -> dict[str, Any]:
    """A review with a number for a label."""
    return {"text": row["text"], "label": float(row["label"] == "positive")}


def _paired(row: Mapping[str, str]) -> dict[str, Any]:
    """A review with its label as the chosen answer and the other label as the rejected one."""
    other = {"positive": "negative", "negative": "positive"}[row["label"]]
    prompt = f"Review: {row['text']}\nSentiment:"
    return {"prompt": prompt, "chosen": f" {row['label']}", "rejected": f" {other}"}


# Kinds of task that the bundled reviews do not fit as they are: file names, and how a row is written there.
ROWS: dict[Task, tuple[str, Callable[[Mapping[str, str]], dict[str, Any]]]] = {
    Task.regression: ("reviews-{}.jsonl", _numbered),
    Task.preference: ("pairs-{}.jsonl", _paired),
    Task.reward: ("pairs-{}.jsonl", _paired),
}


def _data_of(task: Task) -> dict[str, str]:
    """The bundled reviews as a task needs them, where it needs them otherwise: file name -> JSON lines."""
    from reft_cli.bundled import locate

    if task not in ROWS:
        return {}
    (name, written), files = ROWS[task], {}
    for split in SPLITS:
        lines = locate(f"{BUNDLED}/{split}", kind="data").read_text(encoding="utf-8").splitlines()
        rows = [written(row) for row in map(json.loads, lines)]
        files[name.format(split)] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return files


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{path}: cannot be written: {reason_of(error)}") from error
