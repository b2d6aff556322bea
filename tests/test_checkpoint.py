"""A checkpoint comes back bit for bit or is refused in one line; a write that fails leaves what was there."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from reft_cli import checkpoint
from reft_cli.checkpoint import read_checkpoint, read_training_state, write_checkpoint
from reft_cli.errors import CheckpointError
from reft_cli.runfolder import RunFolder

FILES = ("interventions.safetensors", "reft.json", "training.safetensors", "training.json")
PROGRESS = {"step": 4, "tokens": 123, "recent_losses": [0.1, 1e-30, 3.0], "best_score": None, "loss_scale": {}}
MANIFEST: dict[str, Any] = {
    "reft_version": "0.1.0",
    "step": 4,
    "base": {"name": "a/b", "commit": None, "dtype": "auto", "quantization": None, "shape_hash": "abc"}
    | {"layers": 4, "hidden_size": 8},
    "intervention": {
        "method": "loreft",
        "component": "block_output",
        "layers": [0, 3],
        "positions": "f2+l2",
        "tied": True,
        "rank": 2,
        "width": 8,
    },
    "text": {
        "kind": "classification",
        "metric": "accuracy",
        "format": {"name": "text", "columns": {}},
        "template": {"kind": "text", "prompt": "{text} →", "completion": "ü\n"},
        "labels": ["no", "yes"],
        "labels_given": False,
        "append_eos": True,
        "max_length": 64,
        "on_overflow": "error",
        "extraction": None,
        "beta": None,
    },
    "generation": {"max_new_tokens": 4, "temperature": 0.1, "stop": ["\n"]},
}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Two sites' worth of random numbers, with the ones that are easily lost: -0, denormal, infinite, NaN."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        "bank.projection": torch.randn(2, 2, 8, generator=generator),
        "bank.source_weight": torch.randn(2, 2, 8, generator=generator),
        "bank.source_bias": torch.tensor([[-0.0, 1e-42], [float("inf"), float("nan")]]),
        "head.score.weight": torch.randn(8, 2, generator=generator).T,  # not contiguous
    }
    return made


def moments(seed: int = 0) -> dict[str, Tensor]:
    return {"optimizer.bank.projection.exp_avg": tensors(seed + 9)["bank.projection"], "rng.cpu": torch.get_rng_state()}


def write(path: Path, *, seed: int = 0, step: int = 4, progress: dict[str, Any] = PROGRESS) -> Path:
    write_checkpoint(
        path, tensors=tensors(seed), manifest=MANIFEST | {"step": step}, training=(moments(seed), progress)
    )
    return path


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def bits(found: dict[str, Tensor]) -> dict[str, tuple[object, ...]]:
    return {name: (tensor.dtype, tensor.shape, tensor.contiguous().numpy().tobytes()) for name, tensor in found.items()}


def read_all(path: Path) -> tuple[object, ...]:
    """Everything that a checkpoint says, comparable."""
    found = read_checkpoint(path)
    state, progress = read_training_state(found)
    return bits(found.tensors), found.manifest.model_dump_json(), bits(state), json.dumps(progress)


def refused(path: Path) -> str:
    """The message of the CheckpointError that reading ends with: one line that names a file of the checkpoint."""
    with pytest.raises(CheckpointError) as caught:
        read_all(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and message.isprintable() and len(message) < 600
    return message.removeprefix(f"{path}").lstrip("/: ")


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change reft.json and seal it again, as somebody who means harm would."""
    file = path / "reft.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    change(fields)
    fields["sha256"]["manifest"] = checkpoint._manifest_digest(fields)
    file.write_text(json.dumps(fields), encoding="utf-8")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "step_000004")


# ---- what comes back


def test_a_round_trip_is_bitwise(path: Path):
    found = read_checkpoint(path)
    assert bits(found.tensors) == bits(tensors())
    assert found.manifest.model_dump(include=set(MANIFEST)) == MANIFEST
    state, progress = read_training_state(found)
    assert bits(state) == bits(moments()) and progress == PROGRESS
    assert sorted(contents(path)) == sorted(FILES)


def test_equal_contents_are_equal_files(tmp_path: Path):
    assert contents(write(tmp_path / "a")) == contents(write(tmp_path / "b"))


def test_two_files_are_a_whole_checkpoint_and_cannot_be_gone_on_from(path: Path):
    for name in FILES[2:]:
        (path / name).unlink()
    found = read_checkpoint(path)
    assert bits(found.tensors) == bits(tensors())
    assert refused(path) == "has no training.json, so training cannot go on from it"


def test_spaces_and_the_order_of_keys_do_not_matter(path: Path):
    file, before = path / "reft.json", read_all(path)
    fields = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(dict(reversed(fields.items()))), encoding="utf-8")
    assert read_all(path) == before


def test_nothing_in_a_checkpoint_is_a_pickle(path: Path):
    for name in FILES[::2]:
        assert set(load_file(path / name))
    for name in FILES[1::2]:
        json.loads((path / name).read_bytes())


# ---- damage


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "longer", "one bit", "a folder", "noise", "zeros"])
def test_every_file_is_guarded(path: Path, name: str, damage: str):
    file = path / name
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    if damage == "one bit":
        middle = data.index(b"0.1") if name == "reft.json" else middle  # a number that stays one
        data[middle] ^= 1
    changed = {
        "empty": b"",
        "half": data[:middle],
        "longer": data + b" {}",
        "one bit": data,
        "noise": random.Random(0).randbytes(len(data)),
        "zeros": bytes(len(data)),
    }
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage != "missing":
        file.write_bytes(changed[damage])
    assert name in refused(path)


def test_150_random_damages_are_refused_or_change_nothing(path: Path, tmp_path: Path):
    draw, whole, before = random.Random(20261122), contents(path), read_all(path)
    messages = []
    for _ in range(150):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(path, folder)
        for name in draw.sample(FILES, draw.choice((1, 1, 1, 2))):
            (folder / name).write_bytes(damaged(whole[name], draw))
        try:
            assert read_all(folder) == before
        except CheckpointError as error:
            messages.append(str(error))
            assert "\n" not in str(error) and str(error).isprintable()
    assert len(messages) > 130  # a space more or less in JSON is no damage
    assert len({*messages}) > 5


def damaged(data: bytes, draw: random.Random) -> bytes:
    """One of: flipped bits, a cut, a doubled or lost piece, bytes put in, pieces swapped."""
    start = draw.randrange(len(data))
    stop = min(len(data), start + draw.choice((1, 2, 8, 64)))
    kind = draw.randrange(6)
    if kind == 0:
        flipped = bytearray(data)
        for _ in range(draw.choice((1, 1, 3))):
            flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    if kind == 1:
        return data[:start]
    if kind == 2:
        return data[:stop] + data[start:]
    if kind == 3:
        return data[:start] + data[stop:]
    if kind == 4:
        return data[:start] + draw.randbytes(draw.choice((1, 4))) + data[start:]
    return data[stop:] + data[:stop]


@pytest.mark.parametrize("names", [FILES[:1], FILES[1:2], FILES[:2], FILES[2:], FILES[2:3], FILES[3:]])
def test_files_of_another_checkpoint_are_seen(path: Path, tmp_path: Path, names: tuple[str, ...]):
    other = write(tmp_path / "step_000008", seed=1, step=8, progress=PROGRESS | {"step": 8})
    for name in names:
        shutil.copy(other / name, path / name)
    refused(path)


def swap_tensors(path: Path) -> None:
    """Two tensors of one shape change places, and all digests are made to fit."""
    stored = load_file(path / "interventions.safetensors")
    first, second = stored["bank.projection"], stored["bank.source_weight"]
    data = save(stored | {"bank.projection": second, "bank.source_weight": first})
    (path / "interventions.safetensors").write_bytes(data)


def test_swapped_tensors_are_seen(path: Path):
    swap_tensors(path)
    assert refused(path).startswith("interventions.safetensors: damaged: its contents")


@pytest.mark.parametrize(
    "change",
    [
        {"bank.source_bias": torch.zeros(2, 3)},
        {"bank.source_bias": torch.zeros(2, 2, dtype=torch.float64)},
        {"bank.extra": torch.zeros(1)},
    ],
)
def test_tensors_that_the_manifest_does_not_list(path: Path, change: dict[str, Tensor]):
    data = save(load_file(path / "interventions.safetensors") | change)
    (path / "interventions.safetensors").write_bytes(data)
    rewrite(path, lambda fields: fields["sha256"].update(tensors=checkpoint._digest(data)))
    assert refused(path) == "interventions.safetensors: damaged: its tensors are not those that reft.json lists"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "not JSON"),
        ('{"a":' * 500 + "1" + "}" * 500, "reft_version: Field required"),
        ("[]", "the file: "),
        ("null", "the file: "),
        ('"reft"', "the file: "),
        ("{}", "reft_version: Field required"),
        ("1" * 5000, "not JSON"),
        ("\ufeff{}", "not JSON"),
        ('{"a": "\\ud800"}', "Field required"),
        ("{" + " " * 2**24 + "}", "larger than any that reft writes"),
        ('{"format": 1e999}', "format: "),
    ],
)
def test_json_that_is_no_manifest(path: Path, text: str, said: str):
    (path / "reft.json").write_text(text, encoding="utf-8")
    message = refused(path)
    assert message.startswith("reft.json: damaged: ") and said in message


def test_depth_has_a_limit_and_no_traceback(path: Path):
    file = path / "reft.json"
    whole = file.read_text(encoding="utf-8")
    for depth in range(100, 1100, 9):
        file.write_text(whole.replace('"{text} →"', "[" * depth + "]" * depth), encoding="utf-8")
        refused(path)


def test_bytes_that_are_no_text(path: Path):
    (path / "reft.json").write_bytes(b'{"reft_version": "\xff\xfe"}')
    assert refused(path) == "reft.json: damaged: not UTF-8 text"


def put(*keys: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        for key in keys[:-1]:
            fields = fields[key]
        fields[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("format",), 2, "reft.json: format 2; this version reads up to 1: update reft"),
        (("format",), 0, "format: Input should be 1"),
        (("format",), "1", "format: Input should be 1"),
        (("extra",), 1, "extra: Extra inputs are not permitted"),
        (("a\nb\x1b[31m",), 1, r"a\nb\x1b[31m: Extra inputs are not permitted"),
        (("step",), -1, "step: Input should be greater than or equal to 0"),
        (("step",), "4", "step: Input should be a valid integer"),
        (("base", "layers"), 0, "base.layers: "),
        (("base", "name"), ["../../etc"], "base.name: Input should be a valid string"),
        (("intervention", "method"), "../loreft", "intervention.method: Input should be 'loreft', "),
        (("intervention", "layers"), [], "intervention.layers: Value error, no layer is named"),
        (("intervention", "layers"), [-1], "layer -1 is negative"),
        (("intervention", "layers"), [0, 0], "layer 0 is named twice"),
        (("intervention", "positions"), "f0", "intervention.positions: Value error, `f0` is not a position"),
        (("intervention", "rank"), 0, "intervention.rank: "),
        (("intervention", "rank"), None, "intervention: Value error, loreft with rank None"),
        (("text", "labels"), None, "text: Value error, classification with labels None"),
        (("text", "kind"), "regression", "text: Value error, regression with labels"),
        (("text", "beta"), 0.1, "text: Value error, classification with beta 0.1"),
        (("text", "beta"), 0.0, "text.beta: Input should be greater than 0"),
        (("text", "max_length"), 0, "text.max_length: "),
        (("generation", "temperature"), "hot", "generation.temperature: Input should be a valid number"),
        (("generation", "tmeperature"), 1, "generation.tmeperature: Extra inputs"),
        (("sha256", "tensors"), "../../x", "interventions.safetensors: damaged"),
        (
            ("tensors",),
            {"../../x": {"shape": [1], "dtype": "float32"}},
            "its tensors are not those that reft.json lists",
        ),
    ],
)
def test_a_sealed_manifest_is_believed_only_if_it_makes_sense(path: Path, keys, value, said: str):
    rewrite(path, put(*keys, value=value))
    assert said in refused(path)


@pytest.mark.parametrize("state", [[], {}, {"progress": []}, {"progress": PROGRESS, "sha256": None}, 7])
def test_a_training_state_of_another_kind(path: Path, state: object):
    (path / "training.json").write_text(json.dumps(state))
    assert refused(path).startswith("training.json")


@pytest.mark.parametrize("name", ["nowhere", "step_000004/reft.json", "a\0b"])
def test_what_is_no_folder(path: Path, name: str):
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        read_checkpoint(path.parent / name)


# ---- writing


@pytest.mark.parametrize("broken", ["write_synced", "sync_folder", "_replace"])
@pytest.mark.parametrize("calls", [1, 2, 4])
@pytest.mark.parametrize("there", [True, False])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, calls: int, there: bool
):
    path = tmp_path / "step_000004"
    before = contents(write(path)) if there else {}
    inner, left = getattr(checkpoint, broken), [calls]

    def full(*given: object) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(given[0]))
        inner(*given)

    monkeypatch.setattr(checkpoint, broken, full)
    if left[0] > {"write_synced": 4, "sync_folder": 2, "_replace": 1}[broken]:
        write(path, seed=1)
        return
    with pytest.raises(OSError, match="No space left on device"):
        write(path, seed=1)
    if broken == "sync_folder" and calls == 2:  # the new one was in place already
        assert read_all(path) != before
    else:
        assert (contents(path) if path.exists() else {}) == before
    assert [entry.name for entry in tmp_path.iterdir()] == (["step_000004"] if path.exists() else [])


def test_a_rename_that_fails_puts_the_old_one_back(path: Path, monkeypatch: pytest.MonkeyPatch):
    before, rename = contents(path), Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith("new.tmp"):
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        write(path, seed=1)
    assert contents(path) == before


def test_a_rename_that_fails_with_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.EIO, "Input/output error", str(self))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "step_000004")
    assert not list(tmp_path.iterdir())


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[int | str] = []
    rename = Path.rename

    def renamed(folder: Path, target: Path) -> Path:
        events.append(target.name)
        return rename(folder, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(Path, "rename", renamed)
    path = write(tmp_path / "step_000004")
    files = {file.stat().st_ino for file in path.iterdir()}
    assert len(files) == 4 and set(events[:4]) == files
    assert events[4:] == [path.stat().st_ino, "step_000004", tmp_path.stat().st_ino]


def test_an_older_folder_is_replaced_whole(path: Path):
    (path / "note.txt").write_text("mine")
    write(path, seed=1)
    assert sorted(contents(path)) == sorted(FILES)
    assert bits(read_checkpoint(path).tensors) == bits(tensors(1))


def test_what_a_killed_process_of_the_same_number_left_is_no_obstacle(path: Path):
    for use in ("new", "old"):
        stale = path.with_name(f".{path.name}.{os.getpid()}.{use}.tmp")
        stale.mkdir()
        (stale / "interventions.safetensors").write_bytes(b"")
    write(path, seed=1)
    assert [entry.name for entry in path.parent.iterdir()] == ["step_000004"]


def test_what_another_killed_process_left_is_no_checkpoint_and_goes(tmp_path: Path):
    run = RunFolder(tmp_path)
    whole = write(run.checkpoint(4))
    stale = whole.with_name(".step_000008.77777.new.tmp")
    shutil.copytree(whole, stale)
    assert run.checkpoints() == [whole]
    run.prune(1)
    assert run.checkpoints() == [whole] and not stale.exists()
