"""`reft doctor`: facts for a bug report, and no secrets."""

import torch


def test_the_facts_as_json(reft):
    found = reft("doctor", "--json").json
    assert found["versions"]["torch"] == torch.__version__
    assert set(found) == {"versions", "machine", "torch", "hub", "cache"}
    assert found["torch"]["devices"] == [] or found["torch"]["cuda"]


def test_the_facts_as_lines(reft):
    done = reft("doctor")
    assert done.code == 0 and done.err == ""
    assert f"versions torch         {torch.__version__}" in done.out
    assert "bytes" not in done.out


def test_a_token_is_present_and_not_shown(reft, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "secret" * 5)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    done = reft("doctor", "--json")
    assert done.json["hub"]["token"] is True
    assert "secret" not in done.out + done.err


def test_the_cache_is_shown_with_its_size(reft, monkeypatch, tmp_path):
    monkeypatch.setenv("REFT_CACHE", str(tmp_path))
    (tmp_path / "encoded").mkdir()
    (tmp_path / "encoded" / "a.safetensors").write_bytes(bytes(300 << 20))
    assert reft("doctor", "--json").json["cache"] == {
        "folder": str(tmp_path),
        "size_bytes": 300 << 20,
        "limit_bytes": 4 << 30,
    }
    lines = [line.split() for line in reft("doctor").out.splitlines() if line.startswith("cache")]
    assert lines == [
        ["cache", "folder", str(tmp_path)],
        ["cache", "size", "0.3", "GiB"],
        ["cache", "limit", "4.0", "GiB"],
    ]
    monkeypatch.setenv("REFT_CACHE", "off")
    assert "cache folder" in (out := reft("doctor").out) and "none" in out


def test_a_graphics_card_is_described(reft, monkeypatch):
    class Facts:
        name, major, minor = "Card", 9, 0

    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda index: Facts(),
        "mem_get_info": lambda index: (2**30, 2**32),
        "is_bf16_supported": lambda including_emulation: True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("reft_cli.cli.doctor._nccl", lambda: "2.27.5")
    assert "Card (1.0 GiB of 4.0 GiB free, compute capability 9.0)" in reft("doctor").out
    assert reft("doctor", "--json").json["torch"]["nccl"] == "2.27.5"
