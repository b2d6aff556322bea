"""Run folders that were damaged or made to harm: refused with code 4 and one line, or their weights are unchanged."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save
from test_checkpoint import damaged
from torch import Tensor

from reft_cli import checkpoint as files
from reft_cli import runs
from reft_cli.checkpoint import Manifest, read_checkpoint
from reft_cli.cli.app import main
from reft_cli.errors import ReftError, exit_code
from reft_cli.models.loading import BaseModel, BaseSource, load_causal_lm, load_tokenizer
from reft_cli.runfolder import RunFolder, find, step_of
from reft_cli.runs.assemble import build_from_checkpoint, build_from_spec
from reft_cli.runs.resuming import check_same_run, starting_point
from reft_cli.runs.texts import text_side_of
from reft_cli.spec.load import LoadedSpec
from reft_cli.training.observer import NullObserver
from reft_cli.training.optimizer import build_optimizer, trainable_parameters
from reft_cli.training.state import restore_state

PLAIN = ("run.json", "resolved.yaml", "spec.yaml", "metrics.jsonl", "eval/E.json")
SEALED = ("reft.json", "interventions.safetensors", "training.json", "training.safetensors")
FOREIGN: list[Any] = [
    None, True, -1, 0, 7, 2**31, 10**30, 0.5, float("nan"), float("inf"), "", "x", "../../../etc/passwd", "/dev/zero",
    "step_000001", "a\x1b[31m\nb", "\ud800", "{{ 1/0 }}", "{x", "y" * 5000, [], {}, [None], {"x": 1}, [[[[]]]],
    [1.5] * 3, ["a", "a"], {"": {}}, "f1+l1", "red", "2026-01-01",
]  # fmt: skip


class World:
    """An intact run, and what is needed to use one without loading a model each time."""

    def __init__(self, run: Path, spec: LoadedSpec) -> None:
        self.run, self.spec = run, spec
        source = BaseSource(name=spec.spec.model.name, device="cpu")
        self.base: BaseModel = load_causal_lm(source)
        self.tokenizer = load_tokenizer(source)
        self.whole = self.use(run)
        self.parts = [self.whole]

    def without(self, copy: Path, name: str) -> None:
        """Learn what a copy of the run comes to when a file of it is gone and another whole checkpoint is taken."""
        (copy / name).unlink()
        self.parts.append(self.use(copy))

    def use(self, run: Path) -> tuple[object, ...]:
        """All that `eval`, `infer`, `runs` and `train --resume` read; the weights and moments that they get."""
        folder = RunFolder(run)
        folder.status(), folder.scores(), folder.evaluations()
        stored = read_checkpoint(find(run).checkpoint)
        text_side_of(stored.manifest, tokenizer=self.tokenizer)
        build_from_checkpoint(self.base, stored)
        check_same_run(folder, self.spec.spec, {}, NullObserver())
        starting_point(folder, "last")  # which may take an older one
        start = starting_point(folder, str(step_of(folder.select("last"))))
        assert start is not None
        model = build_from_checkpoint(self.base, start.checkpoint)
        fresh = build_from_spec(self.base, self.spec.spec)
        optimizer = build_optimizer(fresh, learning_rate=1.0, weight_decay=0.0)
        try:
            restore_state(start.tensors, optimizer, trainable_parameters(fresh), [torch.device("cpu")])
        except (TypeError, KeyError, RuntimeError, ValueError) as error:  # what resuming makes a CheckpointError of
            raise files.CheckpointError(f"{start.checkpoint.path}: {type(error).__name__}") from error
        return _bits(model.trainable_state()), stored.manifest.model_dump_json(), _bits(start.tensors), start.progress

    def verdict(self, run: Path) -> str | None:
        """The line that a run is refused with; None if it can be used."""
        try:
            self.found = self.use(run)
        except ReftError as error:
            line = str(error)
            assert exit_code(error) in (2, 4), line
            assert "\n" not in line and line.isprintable() and len(line) < 900, line
            return line
        return None


def _bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def world(trained: Callable[..., Path], spec_file: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    from reft_cli.spec.load import load_spec

    run = tmp_path_factory.mktemp("intact") / "run"
    shutil.copytree(trained(), run, symlinks=True)
    RunFolder(run).note({"command": ["reft", "train"]})  # not pytest's, whose words would move what is drawn below
    runs.evaluate(run, limit=2, observer=NullObserver())
    next((run / "eval").glob("*.json")).rename(run / "eval/E.json")
    return World(run, load_spec(spec_file))


@pytest.fixture
def copies(world: World, tmp_path: Path) -> Callable[[], Path]:
    """Gives a fresh copy of the intact run, each time in the same place."""

    def copy() -> Path:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(world.run, tmp_path / "run", symlinks=True)
        return tmp_path / "run"

    return copy


@pytest.fixture(scope="module", autouse=True)
def _parts(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("best", "last/reft.json"):
        copy = tmp_path_factory.mktemp("part") / "run"
        shutil.copytree(world.run, copy, symlinks=True)
        world.without(copy, name)


def test_the_intact_run_can_be_used(world: World, copies: Callable[[], Path]):
    assert world.verdict(copies()) is None and world.found == world.whole


def test_170_random_damages_never_change_the_weights(world: World, copies: Callable[[], Path]):
    draw, refused = random.Random(0), []
    names = [*PLAIN, *(f"checkpoints/step_000006/{name}" for name in SEALED)]
    for index in range(170):
        run = copies()
        file = run / names[index % len(names)]
        file.write_bytes(damaged(file.read_bytes(), draw))
        line = world.verdict(run)
        assert line is not None or world.found == world.whole, file
        refused += [line] if line else []
    assert len(refused) > 70


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a JSON value has values."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from places(each, (*path, key))


def changed(value: Any, path: tuple[Any, ...], draw: random.Random) -> Any:
    """The value with another one at a place, or with none."""
    if not path:
        return draw.choice(FOREIGN)
    copy = value.copy()
    if len(path) == 1 and draw.random() < 0.3:
        copy.pop(path[0])
    else:
        copy[path[0]] = changed(value[path[0]], path[1:], draw)
    return copy


def mutate(read: Any, draw: random.Random) -> Any:
    return changed(read, draw.choice([*places(read)][1:]), draw)


def test_120_records_with_other_values_are_read_or_refused(world: World, copies: Callable[[], Path]):
    draw, refused = random.Random(1), []
    for index in range(120):
        run = copies()
        file = run / PLAIN[(0, 1, 3, 4)[index % 4]]
        if file.name == "metrics.jsonl":
            lines = file.read_text().splitlines()
            lines[2] = json.dumps(mutate(json.loads(lines[2]), draw))
            file.write_text("\n".join(lines) + "\n")
        elif file.suffix == ".yaml":
            file.write_text(yaml.safe_dump(mutate(yaml.safe_load(file.read_text()), draw), allow_unicode=True))
        else:
            file.write_text(json.dumps(mutate(json.loads(file.read_text()), draw)))
        line = world.verdict(run)
        assert line is not None or world.found == world.whole
        refused += [line] if line else []
    assert len(refused) > 20


def reseal(run: Path, fields: dict[str, Any]) -> None:
    """Write a manifest with digests that fit, and a training state that fits it."""
    folder = run / "checkpoints/step_000006"
    data = (folder / "interventions.safetensors").read_bytes()
    state = json.loads((folder / "training.json").read_text())
    if isinstance(fields.get("sha256"), dict):
        fields["sha256"] |= {"tensors": files._digest(data)}
        fields["sha256"]["manifest"] = files._manifest_digest(fields)
    (folder / "reft.json").write_text(json.dumps(fields))
    try:
        manifest = Manifest.model_validate(fields)
    except ValueError:
        return
    moments = (folder / "training.safetensors").read_bytes()
    state["sha256"] = files._training_digest(state["progress"], moments, manifest)
    (folder / "training.json").write_text(json.dumps(state))


def test_150_sealed_manifests_with_other_values_give_no_traceback(world: World, copies: Callable[[], Path]):
    draw, refused = random.Random(2), []
    for _ in range(150):
        run = copies()
        fields = json.loads((run / "last/reft.json").read_text())
        reseal(run, mutate(fields, draw))
        line = world.verdict(run)
        refused += [line] if line else []
    assert len(refused) > 90


def test_60_sealed_training_states_with_other_values_give_no_traceback(world: World, copies: Callable[[], Path]):
    draw, refused = random.Random(3), []
    for _ in range(60):
        run = copies()
        file = run / "last/training.json"
        state = json.loads(file.read_text())
        state["progress"] = mutate(state["progress"], draw)
        file.write_text(json.dumps(state))
        reseal(run, json.loads((run / "last/reft.json").read_text()))
        line = world.verdict(run)
        refused += [line] if line else []
    assert len(refused) > 20


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous()


TENSORS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "double precision": lambda t: {name: each.double() for name, each in t.items()},
    "half precision": lambda t: {name: each.half() for name, each in t.items()},
    "integers": lambda t: {name: each.long() for name, each in t.items()},
    "transposed": lambda t: {name: transposed(each) if each.ndim > 1 else each for name, each in t.items()},
    "one missing": lambda t: dict(list(t.items())[1:]),
    "none": lambda t: {},
    "one more": lambda t: t | {"bank.extra": torch.zeros(3)},
    "another name": lambda t: {name.upper(): each for name, each in t.items()},
    "a name with a path": lambda t: {f"../{name}": each for name, each in t.items()},
    "flat": lambda t: {name: each.flatten() for name, each in t.items()},
    "empty": lambda t: {name: each.flatten()[:0] for name, each in t.items()},
    "fewer sites": lambda t: {name: each[:1] if each.ndim > 1 else each for name, each in t.items()},
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("name", ["interventions.safetensors", "training.safetensors"])
def test_other_tensors_under_digests_that_fit(world: World, copies: Callable[[], Path], kind: str, name: str):
    run = copies()
    file = run / "last" / name
    tensors = TENSORS[kind](load_file(file))
    file.write_bytes(save(tensors))
    fields = json.loads((run / "last/reft.json").read_text())
    if name == "interventions.safetensors":
        fields["tensors"] = {key: each.model_dump() for key, each in files.describe_tensors(tensors).items()}
    reseal(run, fields)
    line = world.verdict(run)
    unread = name == "training.safetensors" and kind in ("one more",)
    assert (line is None) == unread, line


def test_a_rank_that_no_memory_holds(world: World, copies: Callable[[], Path]):
    run = copies()
    fields = json.loads((run / "last/reft.json").read_text())
    fields["intervention"]["rank"] = 2**60
    reseal(run, fields)
    assert world.verdict(run) == f"{run}/best: its tensors are not of rank {2**60}".replace(
        "best", "checkpoints/step_000006"
    )


def bomb(levels: int) -> str:
    """A YAML text of some lines that stands for 9^levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harmed",)


TEXTS = {
    "empty": b"",
    "spaces": b" \n\n",
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "long number": b'{"reft_run": ' + b"1" * 5000 + b"}",
    "not utf-8": b"\xff\xfe\x00a",
    "null": b"null\n",
    "list": b"[1, 2]\n",
    "bomb": bomb(12).encode(),
    "tag": b"!!python/object/apply:os.system ['touch harmed']\n",
    "pickle": pickle.dumps(Harm()),
    "zeros": bytes(4096),
}
EVERY = (*PLAIN, *(f"last/{name}" for name in SEALED), "best", "last")


@pytest.mark.parametrize("name", EVERY)
def test_other_contents(world: World, copies: Callable[[], Path], monkeypatch, tmp_path: Path, name: str):
    monkeypatch.chdir(tmp_path)
    for kind, data in TEXTS.items():
        run = copies()
        if name in ("best", "last"):
            (run / name).unlink()
        (run / name).write_bytes(data)
        line = world.verdict(run)
        assert line is not None or world.found == world.whole, (name, kind)
        assert not Path("harmed").exists()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device", "dangling", "loop", "outside"])
def test_what_is_no_file(world: World, copies: Callable[[], Path], tmp_path: Path, name: str, kind: str):
    run = copies()
    path = run / name
    shutil.copytree(run / "checkpoints/step_000006", tmp_path / "outside")
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        target = {"device": "/dev/zero", "dangling": "nowhere", "loop": path.name, "outside": tmp_path / "outside"}[
            kind
        ]
        path.symlink_to(target)
    line = world.verdict(run)
    assert line is not None or _same(world.found, world.parts), line


def _same(found: tuple[object, ...], parts: list[tuple[object, ...]]) -> bool:
    """Whether weights, moments and progress are those of a checkpoint that is whole."""
    return any((found[0], *found[2:]) == (part[0], *part[2:]) for part in parts)


def test_folders_that_changed_places(world: World, copies: Callable[[], Path]):
    run = copies()
    folder = run / "checkpoints"
    for old, new in (("step_000003", "x"), ("step_000006", "step_000003"), ("x", "step_000006")):
        (folder / old).rename(folder / new)
    line = world.verdict(run)
    assert line in [
        f"{folder}/step_00000{name}: was step {step} when it was written, and has another one's name"
        for name, step in ((6, 3), (3, 6))
    ]


@pytest.mark.parametrize(
    "words", ["runs show RUN", "runs ls FOLDER", "runs diff RUN RUN", "eval RUN", "infer RUN --prompt a"]
)
@pytest.mark.parametrize("name", ["run.json", "resolved.yaml", "metrics.jsonl", "eval/E.json", "last/reft.json"])
def test_the_program_says_it_in_one_line(
    world: World, copies: Callable[[], Path], capsys, monkeypatch, words: str, name: str
):
    for kind in ("deep", "bomb", "list", "not utf-8"):
        run = copies()
        monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)
        (run / name).write_bytes(TEXTS[kind])
        with pytest.raises(SystemExit) as end:
            main(words.replace("RUN", str(run)).replace("FOLDER", str(run.parent)).split())
        err = capsys.readouterr().err
        assert end.value.code in (0, 4), err
        assert "Traceback" not in err and "internal error" not in err
        assert len(err.splitlines()) == 1 or end.value.code == 0, err


def test_a_folder_that_cannot_be_written(make_spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a read-only mount is; the superuser may write in folders without write permission."""

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ReftError) as caught:
        runs.train(make_spec(), output=tmp_path / "run", observer=NullObserver())
    assert exit_code(caught.value) == 2
    assert str(caught.value) == f"{tmp_path}/run: cannot write there: read-only file system"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        ("\n\n", "no rows"),
        ('{"text": "a", "label": NaN}\n', "column `label` is nan; a missing value has no text"),
        ('{"text": NaN, "label": "yes"}\n', "text"),
        ('{"text": "a", "label": Infinity}\n', "label"),
    ],
)
def test_data_without_rows_or_with_no_numbers(make_spec, tmp_path: Path, text: str, said: str):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ReftError) as caught:
        runs.train(make_spec(f"data.train={tmp_path}/rows.jsonl"), output=tmp_path / "run", observer=NullObserver())
    assert exit_code(caught.value) == 3 and said in str(caught.value), caught.value
    assert not (tmp_path / "run").exists()
