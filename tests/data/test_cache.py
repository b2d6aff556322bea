"""Kept tokens: the same examples as tokenizing again, found by content, whatever happens to the files."""

import os
import stat
import threading
import time

import pytest

from reft_cli.data import cache
from reft_cli.data.cache import cache_folder, cache_size, cached
from reft_cli.data.encode import Counts, Encoded, Notice
from reft_cli.data.examples import Example, Examples
from reft_cli.errors import DataError

KEY = "0" * 64


def made(name="train.jsonl", *, rows=5, label=None, typed=False):
    examples = [
        Example(list(range(row, 9)), row, label, "é\ud800" * row, "", row, [0] * (9 - row) if typed else None)
        for row in range(1, rows + 1)
    ]
    counts = Counts(read=7, used=rows, dropped=Notice(2, 6))
    return Encoded(name, Examples.of(examples), counts, ("a", "b") if label is not None else None)


def never():
    raise AssertionError("the rows were tokenized again")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "encoded"


@pytest.fixture
def heard():
    return []


def keep(heard, *, key=KEY, make=made):
    return cached("train.jsonl", key=key, make=make, tell=heard.append)


@pytest.mark.parametrize("given", [{}, {"label": 1}, {"label": 0.5}, {"typed": True}])
def test_what_was_kept_comes_back_equal_under_the_name_of_the_rows(folder, heard, given):
    first = keep(heard, make=lambda: made(**given))
    again = cached("other.json", key=KEY, make=never, tell=heard.append)
    assert again == Encoded("other.json", first.examples, first.counts, first.classes)
    assert heard == [f"other.json: tokens from {folder / KEY}.safetensors"]
    assert keep(heard, key="1" * 64, make=lambda: made(rows=2)) == made(rows=2)


def test_only_the_user_may_read_it(folder, heard):
    keep(heard)
    (entry,) = folder.iterdir()
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600 and stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("harm", ["empty", "cut", "flipped", "text", "folder"])
def test_a_damaged_file_counts_as_none_and_is_written_anew(folder, heard, harm):
    keep(heard)
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    if harm == "folder":
        entry.unlink()
        entry.mkdir()
        assert keep(heard) == made()
        assert "tokens are not kept" in heard[0]
        return
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    entry.write_bytes({"empty": b"", "cut": whole[:-7], "flipped": flipped, "text": b"hello, I am text"}[harm])
    assert keep(heard) == made()
    assert entry.stat().st_size == len(whole)
    assert keep(heard, make=never) == made()


def test_an_error_is_raised_and_not_kept(folder, heard):
    def fail():
        raise DataError("train.jsonl: nothing to learn")

    for _ in range(2):
        with pytest.raises(DataError, match="nothing to learn"):
            keep(heard, make=fail)
    assert not folder.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_one_quiet_line(tmp_path, monkeypatch, heard):
    tmp_path.chmod(0o500)
    monkeypatch.setenv("REFT_CACHE", str(tmp_path / "cache"))
    assert keep(heard) == made()
    assert len(heard) == 1 and heard[0].startswith("train.jsonl: tokens are not kept: [Errno 13]")


def test_a_file_in_the_way_is_one_quiet_line(tmp_path, monkeypatch, heard):
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("REFT_CACHE", str(tmp_path / "cache"))
    assert keep(heard) == made()
    assert len(heard) == 1 and heard[0].startswith("train.jsonl: tokens are not kept: ")


def test_a_full_disk_leaves_nothing_behind(folder, heard, monkeypatch):
    def full(columns, path, metadata):
        raise cache.SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    assert keep(heard) == made()
    assert heard == ["train.jsonl: tokens are not kept: Error while serializing: No space left on device"]
    assert list(folder.iterdir()) == []


def test_writers_at_once_leave_one_whole_file(folder, heard):
    barrier = threading.Barrier(8)

    def write():
        barrier.wait()
        keep([], make=lambda: made(rows=8))

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [file.name for file in folder.iterdir()] == [f"{KEY}.safetensors"]
    assert keep(heard, make=never) == made(rows=8)


def test_the_entries_not_used_for_longest_go_first(folder, heard, monkeypatch):
    now = time.time()
    for age, key in ((300, "a"), (200, "b"), (100, "c")):
        keep(heard, key=key)
        os.utime(folder / f"{key}.safetensors", (now - age, now - age))
    (folder / "old.tmp").touch()
    os.utime(folder / "old.tmp", (0, 0))
    (folder / "new.tmp").touch()
    monkeypatch.setattr(cache, "LIMIT", 3 * (folder / "a.safetensors").stat().st_size)
    keep(heard, key="a", make=never)  # so b is the one not used for longest
    keep(heard, key="d")
    assert sorted(file.name for file in folder.iterdir()) == [
        "a.safetensors", "c.safetensors", "d.safetensors", "new.tmp",
    ]  # fmt: skip
    monkeypatch.setattr(cache, "LIMIT", 1)
    keep(heard, key="e")
    assert sorted(file.name for file in folder.iterdir()) == ["e.safetensors", "new.tmp"]
    assert cache_size() == (folder / "e.safetensors").stat().st_size


def test_where_the_folder_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for cache_home, given, expected in (
        ("", "", tmp_path / ".cache" / "reft"),
        ("relative", "", tmp_path / ".cache" / "reft"),
        ("/big", "", "/big/reft"),
        ("/big", "/mine", "/mine"),
        ("", "~/mine", tmp_path / "mine"),
        ("/big", "off", None),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
        monkeypatch.setenv("REFT_CACHE", given)
        assert cache_folder() == (None if expected is None else type(tmp_path)(expected))


def test_without_a_folder_nothing_is_kept(heard):
    assert keep(heard) == made() and keep(heard) == made()  # REFT_CACHE is off in tests
    assert heard == [] and cache_size() == 0
