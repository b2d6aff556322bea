"""Rows from files, folders, the hub and what is bundled: a list of mappings, and where each one was found.

Columns have no meaning here. A problem with a file is a DataError that names the file and, where there are lines, the
line.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from reft_cli import bundled
from reft_cli.data.download import fetch
from reft_cli.errors import DataError, Problem, first_line, reason_of

Row = dict[str, Any]
T = TypeVar("T")
ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "validation_matched"),
    "test": ("test", "testing"),
}
SPLIT = re.compile(r"(?P<name>[\w.-]*)(?P<slice>\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
SORTED = json.JSONEncoder(sort_keys=True, default=str).encode
SEPARATORS = (";", "\t", "|")  # what some programs write between the columns of a CSV file
LONGEST_FIELD = 1 << 30  # characters in a CSV field; Python's own limit of 131,072 is shorter than some documents


class NoSuchFile(DataError):
    """There is nothing at the `given` path."""

    def __init__(self, *problems: Problem | str, given: str) -> None:
        super().__init__(*problems)
        self.given = given


@dataclass(frozen=True)
class Source:
    """Where rows come from: a file, a folder, an https address, a hub id or `bundled:NAME/SPLIT`."""

    path: str
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Rows:
    """Rows in the order of their file; `numbers` counts them from 1, `lines` are their lines where a file has lines.

    Rows of several sources have a place and the name of their source each.
    """

    name: str
    rows: list[Row]
    numbers: list[int]
    lines: list[int] | None = None
    places: list[str] | None = None
    sources: list[str] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """How messages name the place of a row: `train.jsonl:12`, or `train.parquet: row 12`."""
        if self.places is not None:
            return self.places[index]
        if self.lines is None:
            return f"{self.name}: row {self.numbers[index]}"
        return f"{self.name}:{self.lines[index]}"

    def take(self, indices: Iterable[int]) -> Rows:
        """Some of the rows; they keep their numbers and lines."""
        chosen = list(indices)

        def of(values: list[T]) -> list[T]:
            return [values[index] for index in chosen]

        return Rows(
            self.name,
            of(self.rows),
            of(self.numbers),
            None if self.lines is None else of(self.lines),
            None if self.places is None else of(self.places),
            None if self.sources is None else of(self.sources),
        )

    def first(self, count: int | None) -> Rows:
        """So many rows from the beginning; all for None."""
        return self if count is None else self.take(range(min(count, len(self))))

    @cached_property
    def columns(self) -> list[str]:
        """Every column that a row has, in the order of appearance."""
        return list(dict.fromkeys(column for row in self.rows for column in row))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the rows' content and order; the file's name and format do not count."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(SORTED(row).encode() + b"\n")
        return digest.hexdigest()


def read_rows(source: Source) -> Rows:
    """All rows of a source, or those that `split` and `limit` ask for. DataError where there are none."""
    if bundled.is_bundled(source.path):
        rows = _read_local(source, bundled.locate(source.path, kind="data"), name=source.path)
    elif source.path and os.path.exists(path := os.path.expanduser(source.path)):
        rows = _read_local(source, Path(path), name=source.path)
    elif source.path.startswith("https://"):
        rows = _read_address(source)
    elif _may_be_on_hub(source.path):
        rows = _read_hub(source)
    else:
        raise _missing(source.path)
    rows = rows.first(source.limit)
    if not rows.rows:
        raise DataError(f"{rows.name}: no rows{f' in split {source.split}' if source.split else ''}")
    return rows


def parse_jsonl(lines: Iterable[bytes], *, name: str) -> Rows:
    """Rows of JSON lines, blank ones left out, from an open file or standard input; `name` is for messages.

    A line ends at a newline and nowhere else: `str.splitlines` would break at U+2028 and U+0085 inside texts too.
    """
    rows, numbers = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            text = _decoded(line, f"{name}:{number}", first=number == 1).rstrip("\r\n")
            try:
                rows.append(json.loads(text))
            except (ValueError, RecursionError) as error:
                in_array = isinstance(error, json.JSONDecodeError) and text.lstrip().startswith("[")
                array = "; each line is a row here, not part of an array" if in_array else ""
                raise DataError(f"{name}:{number}: not JSON ({_because(error)}){array}") from error
            numbers.append(number)
    return _checked(_numbered(name, rows, numbers))


def _read_local(source: Source, path: Path, *, name: str) -> Rows:
    for key, value in (("subset", source.subset), ("revision", source.revision)):
        if value is not None:
            raise DataError(f"{name}: {key} `{value}` has a meaning for data on the hub only; remove it")
    split, part = _parse_split(source.split, name=name)
    if not path.is_dir():
        if split and _canonical(split) not in {"train", *_splits_in(path.name.split("."))}:
            raise DataError(
                f"{name}: split `{split}` of one file; write a slice such as train[:100], or give the folder"
            )
        rows = _read_files([path], name=name)
    elif _is_saved_to_disk(path):
        rows = _read_saved(path, split or "train", name=name)
    else:
        rows = _read_folder(path, split or "train", name=name)
    return rows.take(range(len(rows))[part(len(rows))])


def _parse_split(text: str | None, *, name: str) -> tuple[str, Callable[[int], slice]]:
    """`train[10:50%]` -> ("train", row count -> slice)."""
    if text is None:
        return "", lambda count: slice(None)
    match = SPLIT.fullmatch(text)
    if match is None or not text:
        raise DataError(f"{name}: `{text}` is not a split; write train, train[:100], train[100:] or train[:10%]")

    def bound(given: str | None, count: int) -> int | None:
        if given is None:
            return None
        return round(count * int(given[:-1]) / 100) if given.endswith("%") else int(given)

    return match["name"], lambda count: slice(bound(match["start"], count), bound(match["stop"], count))


def _canonical(split: str) -> str:
    return next((name for name, aliases in ALIASES.items() if split in aliases), split)


def _splits_in(words: Iterable[str]) -> set[str]:
    return {_canonical(word) for word in words}


# Folders


def _read_folder(folder: Path, split: str, *, name: str) -> Rows:
    found: dict[str, list[Path]] = {}
    for file in sorted([*folder.iterdir(), *folder.glob("data/*")]):
        if file.suffix in READERS:
            found.setdefault(_canonical(re.sub(r"-\d+-of-\d+$", "", file.stem)), []).append(file)
    files = found.get(_canonical(split), [])
    if not files:
        names = [*(name for name in ALIASES if name in found), *(name for name in found if name not in ALIASES)]
        there = f"there are {', '.join(names)}" if found else f"a split is a file such as {split}.jsonl"
        raise DataError(f"{name}: the folder has no split `{split}`; {there}")
    if len(files) > 1 and not all(re.search(r"-\d+-of-\d+$", file.stem) for file in files):
        raise DataError(f"{name}: split `{split}` is more than one file: {', '.join(f.name for f in files)}; name one")
    if bundled.is_bundled(name):
        return _read_files(files, name=f"{name}/{split}")
    return _read_files(files, name=str(files[0]) if len(files) == 1 else name)


def _is_saved_to_disk(folder: Path) -> bool:
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def _read_saved(folder: Path, split: str, *, name: str) -> Rows:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name}: cannot be read as a saved data set ({first_line(error)})") from error
    if isinstance(saved, datasets.DatasetDict):
        names = {_canonical(key): key for key in saved}
        if _canonical(split) not in names:
            raise DataError(f"{name}: the data set has no split `{split}`; there are {', '.join(saved)}")
        saved = saved[names[_canonical(split)]]
    return _numbered(name, saved.to_list())


# The hub, and files at an address


def _may_be_on_hub(path: str) -> bool:
    local = Path(path)
    beside = "/" in path and local.parent.is_dir()  # data/train, where there is a folder data: a file was meant
    return bool(HUB_ID.fullmatch(path)) and local.suffix not in READERS and not beside


def _read_hub(source: Source) -> Rows:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        data = datasets.load_dataset(
            source.path, name=source.subset, split=source.split or "train", revision=source.revision
        )
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{source.path}: no file or folder here, and no data set that the hub gives: {first_line(error)}"
        ) from error
    if source.limit is not None:
        data = data.select(range(min(source.limit, len(data))))
    return _numbered(source.path, data.to_list())


def _read_address(source: Source) -> Rows:
    """Of the split only a slice has a meaning."""
    if Path(source.path).suffix.lower() not in READERS:
        raise DataError(f"{source.path}: an address has to be that of a file that ends in {', '.join(READERS)}")
    _, part = _parse_split(source.split, name=source.path)
    rows = _read_files([fetch(source.path)], name=source.path)
    return rows.take(range(len(rows))[part(len(rows))])


# Files


def _read_files(files: Sequence[Path], *, name: str) -> Rows:
    parts = [_read_file(file, name=name if len(files) == 1 else str(file)) for file in files]
    if len(parts) == 1:
        return parts[0]
    return _numbered(name, [row for part in parts for row in part.rows])


def _read_file(path: Path, *, name: str) -> Rows:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{name}: unknown kind of file; it has to end in {', '.join(READERS)}")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{name}: the file is empty")
        rows = reader(path, name)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({reason_of(error)})") from error
    return _checked(rows)


def _checked(rows: Rows) -> Rows:
    for index, row in enumerate(rows.rows):
        if not isinstance(row, dict):
            raise DataError(
                f'{rows.where(index)}: a row has to be an object such as {{"prompt": …}}, this is {_kind(row)}'
            )
    return rows


def _numbered(name: str, rows: list[Row], lines: list[int] | None = None) -> Rows:
    return Rows(name, rows, list(range(1, len(rows) + 1)), lines)


def _read_jsonl(path: Path, name: str) -> Rows:
    with path.open("rb") as file:
        return parse_jsonl(file, name=name)


def _read_json(path: Path, name: str) -> Rows:
    text = _text(path, name)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        extra = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        if extra and text.lstrip().startswith("{"):
            return _read_jsonl(path, name)  # one object a line in a file that is called .json
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{name}{line}: not JSON ({_because(error)})") from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise DataError(
                f"{name}: an object with {_count(len(lists), 'list')} (keys {', '.join(content) or 'none'}); "
                "rows are an array, or an object with one list"
            )
        content = lists[0]
    if not isinstance(content, list):
        raise DataError(f"{name}: rows are an array of objects, this is {_kind(content)}")
    return _numbered(name, content)


def _read_csv(path: Path, name: str) -> Rows:
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        return _csv_rows(csv.reader(io.StringIO(_text(path, name), newline=""), strict=True), name)
    finally:
        csv.field_size_limit(before)


def _csv_rows(reader: Any, name: str) -> Rows:  # noqa: ANN401  the csv module's reader has no public type
    rows, lines, start = [], [], 1
    header: list[str] = []
    try:
        for values in reader:
            line, start = start, reader.line_num + 1
            if not values:
                continue
            if not header:
                header = _csv_header(values, name)
                continue
            if len(values) != len(header):
                raise DataError(f"{name}:{line}: {_count(len(values), 'value')} for {_count(len(header), 'column')}")
            rows.append(dict(zip(header, values, strict=True)))
            lines.append(line)
    except csv.Error as error:
        raise DataError(f"{name}:{start}: not CSV ({error})") from error
    return _numbered(name, rows, lines)


def _csv_header(names: list[str], name: str) -> list[str]:
    twice = sorted({column for column in names if names.count(column) > 1})
    if twice:
        raise DataError(f"{name}:1: column `{twice[0]}` stands twice in the header")
    other = next((sign for sign in SEPARATORS if len(names) == 1 and sign in names[0]), None)
    if other:
        raise DataError(f"{name}:1: one column, {names[0]!r}; put commas between columns in place of {other!r}")
    return names


def _read_parquet(path: Path, name: str) -> Rows:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        return _numbered(name, pyarrow.parquet.ParquetFile(path).read().to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: not Parquet ({first_line(error)})") from error


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _text(path: Path, name: str) -> str:
    return _decoded(path.read_bytes(), name, first=True)


def _decoded(content: bytes, place: str, *, first: bool) -> str:
    try:
        return content.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text ({error.reason})") from error


def _missing(given: str) -> NoSuchFile:
    if re.fullmatch(r"\d+(\.\d+)?%", given):
        return NoSuchFile(f"{given}: no such file; a fraction is written {float(given[:-1]) / 100:g}", given=given)
    path = Path(os.path.expanduser(given))
    if not os.path.isdir(path.parent):
        return NoSuchFile(f"{given}: no such file; there is no folder {path.parent}", given=given)
    there = sorted(file.name for file in path.parent.iterdir() if file.suffix in READERS or file.is_dir())
    near = get_close_matches(path.name, there, n=1)
    if near:
        return NoSuchFile(f"{given}: no such file; did you mean `{path.parent / near[0]}`?", given=given)
    return NoSuchFile(
        f"{given or 'path'}: no such file; there is {', '.join(there[:8]) or 'no data file in its folder'}", given=given
    )


def _because(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = (
        f"{error.msg.removesuffix(' at')}, column {error.colno}"
        if isinstance(error, json.JSONDecodeError)
        else first_line(error)
    )
    return text[:1].lower() + text[1:]


def _kind(value: object) -> str:
    names = {list: "a list", dict: "an object", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "s")
