"""The rows that a spec's `data` section means: one source or several, shares, weights, templates of their own."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from reft_cli.data.formats import COLUMNS
from reft_cli.data.mixing import draw, mix, repeat, split_off
from reft_cli.data.records import ALIASES, READERS, Rows, Source, read_rows
from reft_cli.data.templates import Inline, TextTemplate
from reft_cli.errors import Problem, SpecError
from reft_cli.spec.data import SPLITS, DataSpec, SourceSpec, TemplateSpec
from reft_cli.spec.quoting import listed, printable
from reft_cli.spec.schema import Spec

RENDERED = Inline("{prompt}", "{completion}", "{reference}")
"""The template of rows whose sources have had templates of their own."""


def training_rows(spec: Spec) -> tuple[Rows, Rows | None]:
    """(training rows, validation rows or None); of the latter the first `evaluation.limit` of each source."""
    limit = spec.evaluation.limit
    if isinstance(spec.data.validation, float):
        rows, held_out = _parted(spec.data, spec.data.validation, seed=spec.train.seed)
        return rows, _first(held_out, limit)
    return rows_of(spec, "train"), None if spec.data.validation is None else rows_of(spec, "validation", limit=limit)


def rows_of(spec: Spec, split: str, *, limit: int | None = None) -> Rows:
    """The rows of a split, or the first `limit` of each of its sources. SpecError: the spec does not say where.

    Where validation is a fraction of the training rows, they are parted under the seed.
    """
    data, seed = spec.data, spec.train.seed
    _check_split(data, split)
    if isinstance(data.validation, float) and split != "test":
        return _first(_parted(data, data.validation, seed=seed)[split == "validation"], limit)
    return _read(data, split, seed=seed, limit=limit)


def _parted(data: DataSpec, fraction: float, *, seed: int) -> tuple[Rows, Rows]:
    return split_off(_read(data, "train", seed=seed, limit=None), fraction=fraction, seed=seed)


def _first(rows: Rows, limit: int | None) -> Rows:
    """The first `limit` rows of each source."""
    sources, seen = rows.sources or [rows.name] * len(rows), Counter[str]()
    chosen = []
    for index, source in enumerate(sources):
        seen[source] += 1
        if limit is None or seen[source] <= limit:
            chosen.append(index)
    return rows.take(chosen)


def _read(data: DataSpec, split: str, *, seed: int, limit: int | None) -> Rows:
    given = getattr(data, split)
    if not isinstance(given, list):
        return _rows_of_source(data, _source_spec(given), split, seed=seed, limit=limit)
    parts = [_rows_of_source(data, source, split, seed=seed, limit=limit) for source in given]
    return mix(list(zip(_names(given), parts, strict=True)))


def _source_spec(given: str | SourceSpec) -> SourceSpec:
    return SourceSpec(path=given) if isinstance(given, str) else given


def template_of(data: DataSpec) -> str | Inline | None:
    """The template that a run's rows are read with."""
    if data.has_own_templates:
        return RENDERED
    return _inline(data.template) if isinstance(data.template, TemplateSpec) else data.template


def names_a_split(path: str) -> bool:
    """Whether a path is one split already: a file, or bundled:NAME/SPLIT."""
    return path.endswith(tuple(READERS)) or (path.startswith("bundled:") and "/" in path)


def _check_split(data: DataSpec, split: str) -> None:
    if split not in SPLITS:
        raise SpecError(f"--split {printable(split)}: the run's spec has {listed(SPLITS, last='and')}")
    if getattr(data, split) is None:
        raise SpecError(f"data.{split}: missing; name a file, a folder, a hub id or bundled:NAME/SPLIT")


def source_of(data: DataSpec, given: SourceSpec, split: str) -> Source:
    """Where the rows of a source of a split come from. SpecError: the spec does not say, or they are training rows."""
    path = _local(data.folder, given.local, given.split or split) if data.folder and given.local else given.path
    if path is None:
        train = _source_spec(data.train) if isinstance(data.train, str | SourceSpec) else None
        path = None if train is None else train.path
        _check_other_rows(train, given, split)
    if path is None:
        raise SpecError(f"data.{split}.path: missing, and data.train has none either")
    named = names_a_split(path)
    chosen = _slice(given.split) if named and path != given.path else given.split
    limit = None if given.share is not None else given.limit
    remote = path == given.path
    return Source(
        path=path,
        split=chosen or (None if named else split),
        subset=given.subset if remote else None,
        revision=given.revision if remote else None,
        limit=limit,
    )


def _check_other_rows(train: SourceSpec | None, given: SourceSpec, split: str) -> None:
    """SpecError: a source without a path of its own would have the rows that `data.train` has, or some of them."""
    if train is None or split == "train":
        return
    one_split = train.path is not None and names_a_split(train.path)  # then only slices tell its parts apart
    ours, theirs = given.split or split, train.split or "train"
    where = (given.subset, given.share, given.rest), (train.subset, train.share, train.rest)
    same = _slice(ours) == _slice(theirs) if one_split else ours == theirs
    if same and where[0] == where[1]:
        message = "has no path of its own, so these are rows of data.train; give a path, or another split or slice"
        raise SpecError(Problem(message, key=f"data.{split}"))


def _local(folder: str, name: str, split: str) -> str:
    """A data set in the user's folder: `FOLDER/NAME`, or the file `FOLDER/NAME.SPLIT.jsonl`."""
    path = Path(os.path.expanduser(folder)) / name
    if not path.exists():
        word = split.partition("[")[0]
        words = next((aliases for aliases in ALIASES.values() if word in aliases), (word,))
        files = [path.with_name(f"{path.name}.{each}{ending}") for each in words for ending in READERS]
        path = next((file for file in files if file.exists()), path)
    return str(path)


def _slice(split: str | None) -> str | None:
    """`train[:10]` of a file that is a split already is `[:10]`."""
    _, bracket, rest = (split or "").partition("[")
    return bracket + rest or None


def _rows_of_source(data: DataSpec, given: SourceSpec, split: str, *, seed: int, limit: int | None) -> Rows:
    rows = read_rows(source_of(data, given, split))
    if given.share is not None:
        rows = draw(rows, share=given.share, seed=seed, rest=given.rest).first(given.limit)
    if given.weight != 1:
        rows = repeat(rows, weight=given.weight, seed=seed)
    rows = rows.first(limit)
    return _rendered(rows, data, given) if data.has_own_templates else rows


def _rendered(rows: Rows, data: DataSpec, given: SourceSpec) -> Rows:
    """Rows as prompt, completion and reference, by the source's own template or by `data.template`."""
    chosen = given.template or (data.template if isinstance(data.template, TemplateSpec) else None)
    if chosen is None or chosen.completion is None:
        raise SpecError(
            Problem(
                f"{rows.name}: where one source has a template, each needs one with a prompt and a completion, "
                "its own or data.template",
                key="data.template",
            )
        )
    template = TextTemplate(chosen.prompt, chosen.completion, reference=chosen.reference, replace=chosen.replace)
    made = []
    for index, row in enumerate(rows.rows):
        where = rows.where(index)
        fields = COLUMNS.fields_of(row, where=where)
        answer = template.render_completion(fields, where=where)
        reference = template.render_reference(fields, where=where)
        prompt = template.render_prompt(fields, where=where)
        made.append({"prompt": prompt, "completion": answer, "reference": reference})
    return Rows(rows.name, made, rows.numbers, rows.lines, rows.places, rows.sources)


def _inline(given: TemplateSpec) -> Inline:
    return Inline(given.prompt, given.completion, given.reference, given.replace)


def _names(sources: Sequence[SourceSpec]) -> list[str]:
    """A name for each source: its own, or the last part of its path; a number is added where two are alike."""
    names: list[str] = []
    for source in sources:
        name = source.name or Path(source.local or source.path or "").stem or "source"
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names
