"""Downloads: once, whole, and with a line for what goes wrong."""

from __future__ import annotations

import http.client
import io
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from reft_cli.data.download import fetch, shared_cache
from reft_cli.errors import DataError

ADDRESS = "https://example.org/data/rows.jsonl"


class Response(io.BytesIO):
    url = ADDRESS


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    """What the net answers, one after the other: bytes or an error."""
    given: list = []

    def urlopen(address: str, *, timeout: float) -> Response:
        assert address == ADDRESS and timeout > 0
        answer = given.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, Response) else Response(answer)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return given


def test_a_file_is_downloaded_once(answers: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    answers.append(b"rows")
    path = fetch(ADDRESS)
    assert path.read_bytes() == b"rows" and path.name.endswith("-rows.jsonl")
    assert path.parent == shared_cache() / "downloads" == tmp_path / "reft/downloads"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(ADDRESS) == path and not answers
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (urllib.error.HTTPError(ADDRESS, 404, "Not Found", None, None), "HTTP Error 404: Not Found"),  # type: ignore[arg-type]
        (urllib.error.URLError("no route"), "<urlopen error no route>"),
        (TimeoutError("timed out"), "timed out"),
        (http.client.IncompleteRead(b""), "IncompleteRead(0 bytes read)"),
    ],
)
def test_what_cannot_be_had(answers: list, error: Exception, text: str):
    answers.append(error)
    with pytest.raises(DataError) as caught:
        fetch(ADDRESS)
    assert str(caught.value) == f"{ADDRESS}: cannot be downloaded: {text}"
    assert not list((shared_cache() / "downloads").iterdir())


def test_offline_nothing_is_asked_for(answers: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        DataError, match=r"was never downloaded, and HF_HUB_OFFLINE is set; give a copy \(data.folder\)$"
    ):
        fetch(ADDRESS)


def test_an_address_that_leads_out_of_https(answers: list):
    answer = Response(b"rows")
    answer.url = "http://example.org/rows.jsonl"
    answers.append(answer)
    with pytest.raises(DataError, match=r"leads to http://example.org/rows.jsonl, which is no https address"):
        fetch(ADDRESS)


def test_half_a_download_is_not_kept(answers: list):
    class Broken(Response):
        def read(self, size: int | None = -1) -> bytes:
            raise ConnectionResetError("connection reset")

    answers.append(Broken(b"rows"))
    with pytest.raises(DataError, match="connection reset"):
        fetch(ADDRESS)
    assert not list((shared_cache() / "downloads").iterdir())


def test_a_relative_cache_is_none_and_a_home_is_needed(answers: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert shared_cache() == tmp_path / "home/.cache/reft"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(DataError, match=r"there is no home folder to keep it below; set XDG_CACHE_HOME$"):
        fetch(ADDRESS)
