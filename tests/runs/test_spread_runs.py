"""Runs on a base part of which stays on disk: the numbers of a whole one; what does not go together is told."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from transformers import PreTrainedModel

from reft_cli import runs
from reft_cli.errors import ModelError, ReftError, SpecError
from reft_cli.models import placement
from reft_cli.runfolder import RunFolder
from reft_cli.runs import execution
from reft_cli.spec.load import LoadedSpec, load_spec
from reft_cli.training.observer import NullObserver

CONFIGS = Path(__file__).parents[2] / "configs/debug"
QUIET = NullObserver()
FEW = ("train.max_steps=3", "data.train.limit=24", "data.validation.limit=4", "evaluation.every=3")
HALF = {"cpu": "16MB"}


def spec_of(name: str, *sets: str) -> LoadedSpec:
    return load_spec(CONFIGS / name, overrides=[*FEW, *sets])


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a base half of which is on disk."""
    return runs.train(spec_of("spread.yaml"), output=tmp_path_factory.mktemp("spread") / "run", observer=QUIET).run


def test_it_trains_resumes_and_answers_like_a_whole_one(spread: Path, tmp_path: Path):
    whole = spec_of("tiny.yaml", "model.device=cpu", "train.gradient_checkpointing=true")
    other = runs.train(whole, output=tmp_path / "whole", observer=QUIET).run
    for name in ("interventions.safetensors", "training.safetensors"):
        assert (spread / "last" / name).read_bytes() == (other / "last" / name).read_bytes()
    record = RunFolder(spread).read()
    assert record["places"] == {"cpu": 2, "disk": 4} and RunFolder(other).read()["places"] == {}
    reasons = [record[f"{each}_reason"] for each in ("record", "cache")]
    assert reasons == ["the base lies on several devices"] * 2 and not record["compiled"]
    more = spec_of("spread.yaml", "train.max_steps=4")
    assert runs.train(more, output=other, resume="last", observer=QUIET).step == 4  # where it lies is free


def test_what_is_tried_of_it_keeps_no_fetched_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen, plain = [], execution.why_not_packed

    def trying(base: PreTrainedModel) -> str | None:
        checkpointed = any(getattr(each, "gradient_checkpointing", False) for each in base.modules())
        seen.append((checkpointed, base.training))
        return plain(base)

    monkeypatch.setattr(execution, "why_not_packed", trying)
    runs.train(spec_of("spread.yaml", "train.max_steps=1"), output=tmp_path / "run", observer=QUIET)
    runs.train(spec_of("tiny.yaml", "model.device=cpu", "train.max_steps=1"), output=tmp_path / "b", observer=QUIET)
    assert seen == [(True, True), (False, False)]


@pytest.mark.parametrize("prompt", ["The film was bad.", "I loved this restaurant."])
def test_it_answers_and_scores_through_generate(spread: Path, prompt: str):
    found = []
    for given in ({}, {"device_map": "auto", "max_memory": HALF}):
        with runs.open_run(spread, place=runs.BasePlace(device="cpu", **given)) as session:
            found.append(session.answer([prompt], settings={"max_new_tokens": 3}))
            slow = session.why_slow({})
    assert found[0][0].text == found[1][0].text and slow == "its blocks lie on several devices"


def test_an_evaluation_gives_the_scores_of_a_whole_base(spread: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(placement, "SHARE", 16e6 / psutil.virtual_memory().available)
    scores = [
        runs.evaluate(
            spread, limit=4, loss=True, place=runs.BasePlace(device="cpu", device_map=given), observer=QUIET
        ).metrics
        for given in (None, "auto")
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_check_says_where_blocks_lie():
    report = runs.check(spec_of("spread.yaml"))
    assert report.model is not None and report.model.places == {"cpu": 2, "disk": 4}


def test_weights_that_are_fetched_take_checkpointing(tmp_path: Path):
    with pytest.raises(ModelError) as caught:
        runs.train(
            spec_of("spread.yaml", "train.gradient_checkpointing=false"), output=tmp_path / "run", observer=QUIET
        )
    assert str(caught.value) == (
        "model.device_map: the base is larger than the devices (2 blocks on cpu, 4 blocks on disk), and weights that "
        "are fetched for a block leave again before the pass is over only with train.gradient_checkpointing: true"
    )


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (("train.compile=on",), "train.compile: on is not possible: the base lies on several devices; write auto or"),
        (("train.cache_frozen=on",), "train.cache_frozen: on is not possible: the base lies on several devices; write"),
    ],
)
def test_what_is_not_possible_on_several_devices(tmp_path: Path, sets: tuple[str, ...], said: str):
    with pytest.raises(ModelError) as caught:
        runs.train(spec_of("spread.yaml", *sets), output=tmp_path / "run", observer=QUIET)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (("parallel.processes=2",), "model.device_map: one process takes all devices, and 2 are asked for; leave out"),
        (("parallel.shard=true",), "model.device_map: one process lays a base out over devices, and parallel.shard"),
        (("model.quantization=nf4",), "model.device_map: a base in nf4 is not laid out over devices; leave out one"),
        (("model.device=cuda:1",), "model.device: cuda:1 is one device; write auto or cuda"),
        (("model.device_map=null",), "model.max_memory: has no meaning without device_map; add device_map: auto"),
        (("model.max_memory.disk=1GB",), "model.max_memory: `disk` is neither cpu nor the number of a GPU"),
        (("model.max_memory.cpu=much",), "a size such as 20GiB"),
        (
            ("task.kind=classification", "data.template=null", "task.metric=null"),
            "model.device_map: the head of task.kind classification trains on one device; leave device_map out",
        ),
    ],
)
def test_what_excludes_a_device_map(sets: tuple[str, ...], said: str):
    with pytest.raises(SpecError) as caught:
        spec_of("spread.yaml", *sets)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"device_map": "balanced"}, "--device-map balanced: the only one is auto"),
        ({"device_map": "auto", "device": "cuda:1"}, "--device-map auto: --device cuda:1 is one device; leave out one"),
    ],
)
def test_what_excludes_the_flag(spread: Path, given: dict[str, str], said: str):
    with pytest.raises(ReftError) as caught:
        runs.open_run(spread, place=runs.BasePlace(**given))
    assert said in str(caught.value)
