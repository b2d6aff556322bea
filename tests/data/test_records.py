"""Rows from files of every kind, and what is said of files that cannot be read."""

import csv
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_cli import bundled
from reft_cli.data.records import Rows, Source, parse_jsonl, read_rows
from reft_cli.errors import DataError

ROWS = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(10)]
ODD = 'line\u2028separator, next\u0085line, "quotes", \ttab, new\nline, 日本 🙂'


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def csv_text(rows):
    def quoted(value):
        return '"' + value.replace('"', '""') + '"'

    lines = [list(rows[0]), *([row[name] for name in rows[0]] for row in rows)]
    return "\r\n".join(",".join(map(quoted, line)) for line in lines)


def write(path, rows):
    """Write rows in the format that the file's name ends in."""
    if path.suffix == ".jsonl":
        jsonl(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    elif path.suffix == ".csv":
        path.write_text(csv_text(rows), encoding="utf-8", newline="")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read(path, **given):
    return read_rows(Source(str(path), **given))


def error_of(path, **given):
    with pytest.raises(DataError) as caught:
        read(path, **given)
    return str(caught.value).replace(f"{Path(path).parent}/", "") if Path(path).is_absolute() else str(caught.value)


def failing(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return error_of(tmp_path / name)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, ending):
    rows = [*ROWS, {"prompt": ODD, "completion": ""}]
    found = read(write(tmp_path / f"rows{ending}", rows))
    assert found.rows == rows
    assert found.numbers == list(range(1, 12))
    assert found.fingerprint == read(jsonl(tmp_path / "same.jsonl", rows)).fingerprint


@given(st.lists(st.dictionaries(st.sampled_from("ab"), st.text(), min_size=2, max_size=2), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_every_kind_of_file(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    for ending in (".jsonl", ".json", ".csv"):
        assert read(write(folder / f"rows{ending}", rows)).rows == rows


def test_places_are_lines_where_there_are_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"a": 1}\n\n{"a": 2}\n')
    found = read(path)
    assert (found.where(1), found.numbers) == (f"{path}:4", [1, 2])
    assert read(write(tmp_path / "rows.json", ROWS)).where(3) == f"{tmp_path}/rows.json: row 4"
    rows = read(write(tmp_path / "rows.csv", [{"a": "two\nlines"}, {"a": "x"}]))
    assert [rows.where(0), rows.where(1)] == [f"{tmp_path}/rows.csv:2", f"{tmp_path}/rows.csv:4"]


def test_a_percentage_is_no_file():
    with pytest.raises(DataError, match=r"^2\.5%: no such file; a fraction is written 0\.025$"):
        read_rows(Source("2.5%"))


def test_a_bundled_split_has_one_name():
    assert read_rows(Source("bundled:reviews", split="test", limit=1)).name == "bundled:reviews/test"


def test_json_of_objects_with_one_list_and_json_lines_in_disguise(tmp_path):
    (tmp_path / "a.json").write_text('{"version": 1, "data": [{"a": 1}]}')
    (tmp_path / "b.json").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "c.json").write_text('\ufeff[{"a": 1}]', encoding="utf-8")
    assert read(tmp_path / "a.json").rows == [{"a": 1}]
    assert read(tmp_path / "b.json").rows == [{"a": 1}, {"a": 2}]
    assert read(tmp_path / "c.json").rows == [{"a": 1}]


def test_lines_of_standard_input():
    rows = parse_jsonl(io.BytesIO('\ufeff{"a": "x\u2028y"}\n\n{"a": 2}'.encode()), name="stdin")
    assert rows.rows == [{"a": "x\u2028y"}, {"a": 2}] and rows.where(1) == "stdin:3"
    with pytest.raises(DataError, match="stdin:1: a row has to be an object"):
        parse_jsonl([b"3"], name="stdin")


def test_a_csv_field_may_be_long_and_python_keeps_its_limit(tmp_path):
    before = csv.field_size_limit()
    assert len(read(write(tmp_path / "long.csv", [{"a": "x" * 200_000}])).rows[0]["a"]) == 200_000
    assert csv.field_size_limit() == before


def test_errors_of_content_name_the_line(tmp_path):
    assert failing(tmp_path, "a.jsonl", '{"a": 1}\n{"a": }\n') == "a.jsonl:2: not JSON (expecting value, column 7)"
    assert failing(tmp_path, "a.jsonl", '[{"a": 1},\n{"a": 2}]') == (
        "a.jsonl:1: not JSON (expecting value, column 11); each line is a row here, not part of an array"
    )
    assert failing(tmp_path, "a.jsonl", '{"a": "\0"}') == "a.jsonl:1: not JSON (invalid control character, column 8)"
    assert failing(tmp_path, "a.csv", "a;b\n1;2\n") == (
        "a.csv:1: one column, 'a;b'; put commas between columns in place of ';'"
    )
    assert failing(tmp_path, "a.json", '[\n{"a": 1},\n{"a" 2}]') == (
        "a.json:3: not JSON (expecting ':' delimiter, column 6)"
    )
    assert failing(tmp_path, "a.jsonl", b'{"a": 1}\n{"a": "\xff"}') == "a.jsonl:2: not UTF-8 text (invalid start byte)"
    assert failing(tmp_path, "a.csv", b"a,b\n\xe9,1") == "a.csv: not UTF-8 text (invalid continuation byte)"
    assert failing(tmp_path, "a.csv", "a,b\n1,2\n1,2,3\n") == "a.csv:3: 3 values for 2 columns"
    assert failing(tmp_path, "a.csv", "a,b\n1\n") == "a.csv:2: 1 value for 2 columns"
    assert failing(tmp_path, "a.csv", "a,a\n1,2\n") == "a.csv:1: column `a` stands twice in the header"
    assert failing(tmp_path, "a.csv", 'a\n"open\n\n') == "a.csv:2: not CSV (unexpected end of data)"
    assert failing(tmp_path, "a.parquet", "PAR1").startswith("a.parquet: not Parquet (")
    assert failing(tmp_path, "a.jsonl", "[" * 200_000) == "a.jsonl:1: not JSON (nested too deeply)"
    assert failing(tmp_path, "a.json", "[" * 200_000) == "a.json: not JSON (nested too deeply)"
    if sys.get_int_max_str_digits():
        assert failing(tmp_path, "a.jsonl", '{"a": ' + "1" * 9999 + "}").startswith("a.jsonl:1: not JSON (exceeds the ")


def test_errors_of_shape(tmp_path):
    assert failing(tmp_path, "a.jsonl", '{"a": 1}\n[1]\n') == (
        'a.jsonl:2: a row has to be an object such as {"prompt": …}, this is a list'
    )
    assert failing(tmp_path, "a.json", '[{"a": 1}, "x"]') == (
        'a.json: row 2: a row has to be an object such as {"prompt": …}, this is a text'
    )
    assert failing(tmp_path, "a.json", '{"x": [], "y": []}') == (
        "a.json: an object with 2 lists (keys x, y); rows are an array, or an object with one list"
    )
    assert failing(tmp_path, "a.json", "{}") == (
        "a.json: an object with 0 lists (keys none); rows are an array, or an object with one list"
    )
    assert failing(tmp_path, "a.json", "12") == "a.json: rows are an array of objects, this is a number"
    assert failing(tmp_path, "a.jsonl", "") == "a.jsonl: the file is empty"
    assert failing(tmp_path, "a.parquet", "") == "a.parquet: the file is empty"
    assert failing(tmp_path, "a.jsonl", "\n\n") == "a.jsonl: no rows"
    assert failing(tmp_path, "a.json", "[]") == "a.json: no rows"
    assert failing(tmp_path, "a.csv", "a,b\n") == "a.csv: no rows"
    assert failing(tmp_path, "a.txt", "x") == (
        "a.txt: unknown kind of file; it has to end in .jsonl, .json, .csv, .parquet"
    )


def test_errors_of_paths(tmp_path, monkeypatch):
    jsonl(tmp_path / "train.jsonl", ROWS)
    assert error_of(tmp_path / "trian.jsonl") == "trian.jsonl: no such file; did you mean `train.jsonl`?"
    assert error_of(tmp_path / "zzz.csv") == "zzz.csv: no such file; there is train.jsonl"
    assert error_of(tmp_path / "no" / "a.csv") == f"a.csv: no such file; there is no folder {tmp_path}/no"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert error_of("data/train") == "data/train: no such file; there is no data file in its folder"
    assert error_of("") == "path: no such file; there is data, train.jsonl"
    for path in ("x" * 5000 + ".jsonl", "a\0b.jsonl", "~nobody-at-all/x.jsonl"):
        assert "no such file" in error_of(path)
    assert error_of("train.jsonl", subset="x") == (
        "train.jsonl: subset `x` has a meaning for data on the hub only; remove it"
    )
    assert error_of("train.jsonl", revision="x") == (
        "train.jsonl: revision `x` has a meaning for data on the hub only; remove it"
    )


def test_a_file_that_must_not_be_read(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "a.json", ROWS)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert error_of(path) == "a.json: cannot be read (permission denied)"


@pytest.mark.parametrize(
    ("split", "first", "count"),
    [("train[:4]", 1, 4), ("train[8:]", 9, 2), ("train[-3:]", 8, 3), ("[2:5]", 3, 3), ("train[:50%]", 1, 5)],
)
def test_slices_keep_the_numbers_of_the_rows(tmp_path, split, first, count):
    rows = read(jsonl(tmp_path / "rows.jsonl", ROWS), split=split)
    assert rows.numbers == list(range(first, first + count))
    assert rows.where(0).endswith(f":{first}")


def test_limit_is_applied_after_the_slice(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    assert read(path, split="train[5:]", limit=2).numbers == [6, 7]
    assert len(read(path, limit=99)) == 10


def test_a_file_named_after_its_split(tmp_path):
    path = jsonl(tmp_path / "reviews.validation.jsonl", ROWS)
    assert len(read(path, split="dev[:2]")) == 2
    assert error_of(path, split="test") == (
        "reviews.validation.jsonl: split `test` of one file; write a slice such as train[:100], or give the folder"
    )
    assert error_of(path, split="train+test") == (
        "reviews.validation.jsonl: `train+test` is not a split; write train, train[:100], train[100:] or train[:10%]"
    )
    assert error_of(path, split="train[50:]") == "reviews.validation.jsonl: no rows in split train[50:]"


def test_folders(tmp_path):
    jsonl(tmp_path / "train.jsonl", ROWS[:3])
    write(tmp_path / "dev.csv", ROWS[:2])
    (tmp_path / "data").mkdir()
    for part in (0, 1):
        write(tmp_path / "data" / f"test-0000{part}-of-00002.parquet", ROWS[part * 5 : part * 5 + 5])
    (tmp_path / "notes.txt").write_text("not data")
    assert read(tmp_path).rows == ROWS[:3]
    assert read(tmp_path).where(1) == f"{tmp_path}/train.jsonl:2"
    assert read(tmp_path, split="validation").rows == ROWS[:2]
    assert read(tmp_path, split="test[3:]").rows == ROWS[3:]
    assert read(tmp_path, split="test").where(9) == f"{tmp_path}: row 10"
    assert error_of(tmp_path, split="extra") == (
        f"{tmp_path.name}: the folder has no split `extra`; there are train, validation, test"
    )
    write(tmp_path / "valid.json", ROWS)
    assert error_of(tmp_path, split="validation") == (
        f"{tmp_path.name}: split `validation` is more than one file: dev.csv, valid.json; name one"
    )
    (tmp_path / "empty").mkdir()
    assert error_of(tmp_path / "empty") == (
        "empty: the folder has no split `train`; a split is a file such as train.jsonl"
    )


def test_data_sets_that_were_saved_to_disk(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "valid": rows.select(range(2))}).save_to_disk(str(tmp_path / "all"))
    rows.save_to_disk(str(tmp_path / "one"))
    assert read(tmp_path / "all").rows == ROWS
    assert read(tmp_path / "all", split="validation").rows == ROWS[:2]
    assert read(tmp_path / "one", split="train[4:6]").rows == ROWS[4:6]
    assert error_of(tmp_path / "all", split="test") == "all: the data set has no split `test`; there are train, valid"
    (tmp_path / "one" / "state.json").write_text("{")
    assert error_of(tmp_path / "one").startswith("one: cannot be read as a saved data set (")


def test_the_hub_goes_through_datasets(monkeypatch):
    asked = {}

    def load_dataset(path, **given):
        asked.update(given, path=path)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows(Source("owner/name", split="train[:10]", subset="main", revision="abc", limit=3))
    assert asked == {"path": "owner/name", "name": "main", "split": "train[:10]", "revision": "abc"}
    assert rows.rows == ROWS[:3] and rows.where(2) == "owner/name: row 3"


@pytest.mark.parametrize("error", [ConnectionError, FileNotFoundError, ValueError, RuntimeError])
def test_a_hub_that_has_no_answer(monkeypatch, error):
    def load_dataset(path, **given):
        raise error("Couldn't reach 'glue' on the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert error_of("glue") == (
        "glue: no file or folder here, and no data set that the hub gives: Couldn't reach 'glue' on the Hub"
    )


def test_offline_the_hub_is_not_asked(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert error_of("nobody/nothing").startswith("nobody/nothing: no file or folder here, and no data set")


def test_an_address_is_read_as_the_file_that_it_is(tmp_path, monkeypatch):
    file = tmp_path / "kept.json"
    file.write_text(json.dumps(ROWS))
    asked = []
    monkeypatch.setattr("reft_cli.data.records.fetch", lambda address: asked.append(address) or file)
    address = "https://example.org/dataset/boolq/test.json"
    rows = read_rows(Source(address, split="test[1:4]", limit=2))
    assert asked == [address]
    assert rows.rows == ROWS[1:3] and rows.where(0) == f"{address}: row 2"
    assert error_of("https://example.org/a") == (
        "https://example.org/a: an address has to be that of a file that ends in .jsonl, .json, .csv, .parquet"
    )


def test_bundled_names(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "locate", lambda name, *, kind: jsonl(tmp_path / "train.jsonl", ROWS))
    rows = read_rows(Source("bundled:reviews/train", limit=4))
    assert rows.name == "bundled:reviews/train" and rows.where(3) == "bundled:reviews/train:4"


def test_the_fingerprint_is_of_content_and_order():
    rows = Rows("a", ROWS, list(range(1, 11)))
    assert rows.fingerprint == Rows("b", [dict(reversed(row.items())) for row in ROWS], rows.numbers).fingerprint
    assert rows.fingerprint != rows.take(range(9)).fingerprint
    assert rows.fingerprint != rows.take([1, 0, *range(2, 10)]).fingerprint
    assert Rows("a", [{"a": "\ud800", "b": SimpleNamespace()}], [1]).fingerprint


def test_columns_are_those_of_all_rows():
    assert Rows("a", [{"b": 1}, {"a": 1, "b": 2}, {"c": 1}], [1, 2, 3]).columns == ["b", "a", "c"]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
@given(st.one_of(st.binary(max_size=60), st.text(alphabet='[]{}",:\n\r 1ae\u2028', max_size=60).map(str.encode)))
@settings(max_examples=150, deadline=None)
def test_any_content_gives_rows_or_a_data_error(tmp_path_factory, ending, content):
    path = tmp_path_factory.getbasetemp() / f"fuzz{ending}"
    path.write_bytes(content)
    try:
        found = read(path)
    except DataError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert found.rows and all(isinstance(row, dict) for row in found.rows)
