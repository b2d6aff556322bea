"""Files that are no specs."""

from __future__ import annotations

import pytest

from reft_cli.errors import SpecError
from reft_cli.spec.files import LARGEST_FILE
from reft_cli.spec.load import load_spec


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.yaml").write_text("model: m\n")
    return tmp_path


def message(path):
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    return str(caught.value)


def test_missing_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/other.yml").write_text("model: m\n")
    assert message("trian.yaml") == "trian.yaml: no such file; did you mean `train.yaml`?"
    assert message("train") == "train: no such file; did you mean `train.yaml`?"
    assert message("train.yml") == "train.yml: no such file; did you mean `train.yaml`?"
    assert message("sub/other.yaml") == "sub/other.yaml: no such file; did you mean `sub/other.yml`?"
    assert message("zzz.yaml") == "zzz.yaml: no such file"
    assert message("nowhere/train.yaml") == "nowhere/train.yaml: no such file; there is no folder nowhere"


def test_folders(tmp_path):
    (tmp_path / "specs").mkdir()
    assert message("specs") == "specs: a folder; a spec is a file"
    for name in "abcd":
        (tmp_path / f"specs/{name}.yaml").write_text("")
    expected = "specs: a folder; a spec is a file, such as `specs/a.yaml`, `specs/b.yaml` or `specs/c.yaml`"
    assert message("specs") == expected
    (tmp_path / "specs/run.json").write_text("{}")
    assert message("specs") == "specs: a run folder; its spec is `specs/spec.yaml`"


def test_bytes(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("model: m\nname: é\n".encode("latin-1"))
    assert message("latin.yaml") == "latin.yaml:2:7: not UTF-8 text (byte 0xe9); save the file as UTF-8"
    (tmp_path / "wide.yaml").write_bytes("model: m\n".encode("utf-16"))
    assert message("wide.yaml").startswith("wide.yaml:1:1: not UTF-8 text")
    (tmp_path / "large.yaml").write_bytes(b"#" * (LARGEST_FILE + 1))
    assert message("large.yaml") == "large.yaml: larger than 256 KiB; this is no spec"


def test_byte_order_mark_and_line_ends(tmp_path):
    (tmp_path / "windows.yaml").write_bytes(b"\xef\xbb\xbfmodel: m\r\ntrain:\r\n  seed: 3\r\n")
    loaded = load_spec(tmp_path / "windows.yaml")
    assert loaded.spec.train.seed == 3
    assert loaded.text == "model: m\r\ntrain:\r\n  seed: 3\r\n"


def test_paths_that_the_system_refuses():
    assert message("x" * 300 + ".yaml").endswith("cannot be read: file name too long")


def test_files_that_loop(tmp_path):
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert "cannot be read: too many levels of symbolic links" in message("loop.yaml")
