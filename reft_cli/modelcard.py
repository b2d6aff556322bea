"""The README.md of a run: what was trained, on what, how well, and how to use it. Text from plain mappings only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def render(
    *,
    name: str,
    record: Mapping[str, Any],
    spec: Mapping[str, Any],
    validation: tuple[int, Mapping[str, float]] | None,
    evaluations: Mapping[str, Mapping[str, Any]],
    spec_text: str,
) -> str:
    """Markdown with a front matter that the hub reads.

    `record` is run.json, `spec` the spec with every key filled, `validation` the (step, scores) of the
    best checkpoint, `evaluations` the results in eval/ by name. What is missing is left out.
    """
    base = _base(spec, record)
    parts = [
        _front_matter(base, record),
        f"# {name}",
        _summary(base, spec, record),
        _scores(validation, evaluations),
        f"## Use\n\n```sh\nreft infer {name} --prompt '...'\nreft eval {name}\n```",
        "The base model's weights are not part of this folder.",
        "## Spec",
        f"```yaml\n{spec_text.strip()}\n```",
        _made_with(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _base(spec: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    model = spec.get("model", {})
    named = model.get("name") if isinstance(model, Mapping) else model
    return str(record.get("base", {}).get("name") or named)


def _front_matter(base: str, record: Mapping[str, Any]) -> str:
    """Only what came from the hub, and so has a commit, is its base_model; a folder means nothing elsewhere."""
    from_hub = record.get("base", {}).get("commit") is not None
    lines = ["---", "library_name: reft", "tags: [reft, representation-finetuning]"]
    return "\n".join([*lines, *([f"base_model: {base}"] if from_hub else []), "---"])


def _summary(base: str, spec: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    edit, task = spec.get("intervention", {}), spec.get("task", {})
    commit = record.get("base", {}).get("commit")
    counts = record.get("data", {})
    rows: dict[str, object] = {
        "Base model, frozen": f"`{base}`" + (f" at `{commit}`" if commit else ""),
        "Method": edit.get("method"),
        "Layers": edit.get("layers"),
        "Component": edit.get("component"),
        "Positions": edit.get("positions"),
        "Rank": edit.get("rank"),
        "Trained parameters": _count(record.get("trainable"), record.get("base", {}).get("parameters")),
        "Task": task.get("kind"),
        "Training rows": counts.get("train", {}).get("used") if isinstance(counts, Mapping) else None,
        "Status": record.get("status"),
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value is not None)


def _count(trained: int | None, total: int | None) -> str | None:
    if trained is None:
        return None
    return f"{trained:,}" + (f" ({trained / total:.3%} of {total:,})" if total else "")


def _scores(validation: tuple[int, Mapping[str, float]] | None, evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    step, scores = validation or (0, {})
    rows: list[tuple[str, str, float]] = [(f"validation, step {step}", key, value) for key, value in scores.items()]
    for name, report in evaluations.items():
        found = report.get("metrics", {}).items()
        rows += [(name, key, value) for key, value in found if isinstance(value, int | float)]
    if not rows:
        return ""
    lines = [f"| {where} | {key} | {value:.4g} |" for where, key, value in rows]
    return "## Scores\n\n| split | metric | value |\n|---|---|---|\n" + "\n".join(lines)


def _made_with(record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items() if version)
    devices = ", ".join(map(str, record.get("devices", [])))
    return f"Made with {versions}" + (f" on {devices}." if devices else ".") if versions else ""
