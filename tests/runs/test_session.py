"""A run that is opened answers as it was trained to: same template, same base, one text however it is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from reft_cli import runs
from reft_cli.checkpoint import Checkpoint, read_checkpoint
from reft_cli.errors import CheckpointError, DataError, ModelError, SpecError
from reft_cli.runs.assemble import build_from_checkpoint, load_trainables, merge_generation
from reft_cli.runs.texts import text_side_of
from reft_cli.spec.load import LoadedSpec
from reft_cli.training.observer import NullObserver
from tiny_models import LLAMA_LIKE, TOKENS, base_of, byte_tokenizer, decoder

Trained = Callable[..., Path]
MakeSpec = Callable[..., LoadedSpec]
SETS = ("train.epochs=4", "train.learning_rate=0.05", "checkpoint.best=loss", "checkpoint.keep=3")
PROMPTS = ["good", "cold film", "a", "warm warm warm fine bad", "poor"]


@pytest.fixture
def run(trained: Trained) -> Path:
    return trained(*SETS)


def texts(session: runs.Session, prompts: list[Any], **given: Any) -> list[str]:
    return [answer.text for answer in session.answer(prompts, **{"settings": {}} | given)]


def save_llama(folder: Path, **changes: int) -> Path:
    """Another tiny Llama, with the byte tokenizer."""
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(LlamaConfig(**(LLAMA_LIKE | TOKENS | changes))).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


# ---- opening


def test_every_path_of_a_run_opens_it(run: Path, tmp_path: Path):
    shutil.copytree(run / "best", tmp_path / "copy")
    found = []
    for path in (run, run / "best", (run / "best").resolve(), tmp_path / "copy"):
        with runs.open_run(path) as session:
            found.append(texts(session, PROMPTS))
    assert found[0] == found[1] == found[2] == found[3]


def test_another_base_is_refused_by_both_names_layers_and_widths(run: Path, tiny_llama: Path, tmp_path: Path):
    other = save_llama(tmp_path / "other", num_hidden_layers=2, hidden_size=16)
    with pytest.raises(CheckpointError) as caught:
        runs.open_run(run, place=runs.BasePlace(model=str(other)))
    checkpoint = (run / "best").resolve()
    assert str(caught.value) == (
        f"{checkpoint} was trained on {tiny_llama} (3 layers, width 32); --model gave {other} (2 layers, width 16)"
    )


def test_another_family_of_the_same_size_is_refused(run: Path, tiny_llama: Path, tmp_path: Path):
    decoder("gpt2").save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match=r"\(3 layers, width 32\), whose parameters have other names or shapes$"):
        runs.open_run(run, place=runs.BasePlace(model=str(tmp_path / "gpt2")))


def test_a_base_that_was_replaced_is_refused(make_spec: MakeSpec, tmp_path: Path):
    base = save_llama(tmp_path / "base")
    spec = make_spec(f"model.name={base}", "train.max_steps=1")
    run = runs.train(spec, output=tmp_path / "run", observer=NullObserver()).run
    shutil.rmtree(base)
    save_llama(base, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=rf"; that name now gives {base} \(2 layers, width 32\)$"):
        runs.open_run(run)
    with pytest.raises(CheckpointError, match="that name now gives"):
        runs.evaluate(run, observer=NullObserver())


def test_a_base_that_has_moved_is_found_by_its_new_place(make_spec: MakeSpec, tmp_path: Path):
    base = save_llama(tmp_path / "base")
    spec = make_spec(f"model.name={base}", "train.max_steps=3")
    run = runs.train(spec, output=tmp_path / "run", observer=NullObserver()).run
    with runs.open_run(run) as session:
        before = texts(session, PROMPTS)
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"base: no such folder"):
        runs.open_run(run)
    with runs.open_run(run, place=runs.BasePlace(model=str(tmp_path / "moved"))) as session:
        assert texts(session, PROMPTS) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"device": "gpu"}, r"model.device: `gpu` is not auto, cpu, mps, cuda or cuda:N"),
        ({"device": "cuda:77"}, r"model.device: cuda:77 does not exist"),
        ({"model": "./nowhere"}, r"\./nowhere: no such folder"),
    ],
)
def test_flags_that_name_nothing(run: Path, flags: dict[str, str], said: str):
    with pytest.raises(ModelError, match=said):
        runs.open_run(run, place=runs.BasePlace(**flags))


def changed(checkpoint: Checkpoint, **tensors: torch.Tensor | None) -> Checkpoint:
    kept = {name: tensor for name, tensor in (checkpoint.tensors | tensors).items() if tensor is not None}
    return replace(checkpoint, tensors=kept)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("bank.source_bias", None, r"tensor bank.source_bias is missing, this intervention has float32 \[3, 2\]"),
        ("bank.source_bias", torch.zeros(3, 3), r"is float32 \[3, 3\], this intervention has float32 \[3, 2\]"),
        ("bank.source_bias", torch.zeros(3, 2).half(), r"is float16 \[3, 2\], this intervention has float32 \[3, 2\]"),
        (
            "../../x\n",
            torch.zeros(1),
            r"tensor \.\./\.\./x\\n is float32 \[1\], this intervention has none of that name",
        ),
    ],
)
def test_tensors_that_do_not_fit_change_nothing(run: Path, name: str, tensor: torch.Tensor | None, said: str):
    checkpoint = read_checkpoint(run / "best")
    model = build_from_checkpoint(base_of("llama"), checkpoint)
    before = {key: value.clone() for key, value in model.trainable_state().items()}
    with pytest.raises(CheckpointError, match=said) as caught:
        load_trainables(model, changed(checkpoint, **{name: tensor}))
    assert "\n" not in str(caught.value)
    torch.testing.assert_close(model.trainable_state(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "stored",
    [
        {"format": {}},
        {"format": {"name": "../x", "columns": {}}},
        {"template": {}},
        {"template": {"kind": "text", "prompt": "{"}},
        {"template": {"kind": "text", "prompt": 5, "completion": None}},
        {"template": {"kind": "chat", "source": "x", "tokens": {}}},
        {"template": {"kind": "bare", "nope": 1}},
    ],
)
def test_a_text_side_that_cannot_be(run: Path, stored: dict[str, Any]):
    manifest = read_checkpoint(run / "best").manifest
    odd = manifest.model_copy(update={"text": manifest.text.model_copy(update=stored)})
    with pytest.raises(CheckpointError, match="format or template is not one of reft's") as caught:
        text_side_of(odd, tokenizer=byte_tokenizer())
    assert str(caught.value).isprintable()


# ---- prompts


def test_a_typed_prompt_gets_the_template_and_a_raw_one_does_not(run: Path):
    with runs.open_run(run) as session:
        typed = texts(session, ["good"])
        assert typed == texts(session, [{"text": "good"}]) == texts(session, ["good ->"], raw=True)
        assert typed != texts(session, ["good"], raw=True)
        assert texts(session, ["{x} }{"], raw=True)  # braces are text


def test_answers_come_in_the_order_of_the_prompts_in_any_batch(run: Path):
    with runs.open_run(run) as session:
        singly = [texts(session, [prompt])[0] for prompt in PROMPTS]
        assert len(set(singly)) > 1
        for size in (1, 2, 32):
            assert texts(session, PROMPTS, settings={"batch_size": size}) == singly
        assert texts(session, PROMPTS[::-1]) == singly[::-1]
        assert texts(session, []) == []


def test_without_the_intervention_it_is_the_base(run: Path, tiny_llama: Path):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = byte_tokenizer()
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(f"{prompt} ->").input_ids])
        out = base.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
        expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    with runs.open_run(run) as session:
        assert texts(session, PROMPTS, base=True) == expected != texts(session, PROMPTS)


def test_both_models_answer_in_one_batch_as_each_alone(run: Path):
    prompts = ["good", "cold bad", "fine warm warm poor"]
    with runs.open_run(run) as session:
        both = list(session.answers(prompts, settings={}, models=["base", "run"]))
        assert [each["run"] for each in both] == [[each] for each in session.answer(prompts, settings={})]
        assert [each["base"] for each in both] == [[each] for each in session.answer(prompts, settings={}, base=True)]


def test_samples_are_several_answers_of_which_the_first_is_the_answer(run: Path):
    warm = {"temperature": 5.0, "max_new_tokens": 12}
    with runs.open_run(run) as session:
        found = list(session.answers(["good", "bad"], settings=warm, models=["base", "run"], samples=3))
        assert [each["run"][0] for each in found] == session.answer(["good", "bad"], settings=warm)
        assert all(len({answer.text for answer in answers}) == 3 for each in found for answers in each.values())
        with pytest.raises(SpecError, match="--samples 2: without a --temperature above 0"):
            session.answers(["good"], settings={}, samples=2)


def test_samples_of_a_search_are_its_best_beams(run: Path):
    with runs.open_run(run) as session:
        beams = {"beams": 3, "max_new_tokens": 5, "min_new_tokens": 5}
        found = list(session.answers(["good", "bad"], settings=beams, models=["base", "run"], samples=3))
        assert [each["run"][0] for each in found] == session.answer(["good", "bad"], settings=beams)
        assert all(len({answer.text for answer in each[model]}) > 1 for each in found for model in ("base", "run"))
        with pytest.raises(SpecError, match="--samples 4: a search with 3 beams has no more answers"):
            session.answers(["good"], settings=beams, samples=4)


def test_the_hooks_are_the_session_s_and_go_with_it(run: Path):
    session = runs.open_run(run)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in session.model.base_model.modules())

    bare = hooks()
    with session:
        first = texts(session, PROMPTS)
        assert hooks() > bare
    assert hooks() == bare
    with session:
        assert texts(session, PROMPTS) == first


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "raw", "said"),
    [
        ("", True, "prompt 1: the prompt is empty"),
        ({"question": "x"}, False, "prompt 1: no column `text`"),
        ("\ud800", False, "half of a surrogate pair"),
    ],
)
def test_prompts_that_cannot_be_answered(run: Path, prompt: Any, raw: bool, said: str, stream: bool):
    with runs.open_run(run) as session, pytest.raises(DataError, match=said):
        if stream:
            session.stream(prompt, settings={}, raw=raw)  # when it is asked for, not when it is read
        else:
            session.answer([prompt], settings={}, raw=raw)


def test_a_model_with_learned_positions_has_an_end(make_spec: MakeSpec, tmp_path: Path):
    folder = tmp_path / "gpt2"
    decoder("gpt2").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "x" * 130, "label": "yes"}) + "\n")
    long, there = f"data.train={tmp_path / 'long.jsonl'}", f"model.name={folder}"
    with pytest.raises(DataError, match=r"long\.jsonl: row 1: takes 138 tokens, and the model has learned 128 pos"):
        runs.train(make_spec(there, long), output=tmp_path / "run", observer=NullObserver())
    with pytest.raises(DataError, match="takes 138 tokens"):
        runs.check(make_spec(there, long))
    with pytest.raises(DataError, match=r"validation\.jsonl: row \d: takes \d+ tokens for its prompt and up to 120"):
        runs.train(make_spec(there, "generation.max_new_tokens=120"), output=tmp_path / "run", observer=NullObserver())
    assert not (tmp_path / "run").exists()
    run = runs.train(make_spec(there, "train.max_steps=1"), output=tmp_path / "run", observer=NullObserver()).run
    with pytest.raises(DataError, match="row 1: takes 138 tokens"):
        runs.evaluate(run, data=str(tmp_path / "long.jsonl"), observer=NullObserver())
    with runs.open_run(run) as session:
        with pytest.raises(DataError, match=r"prompt 1: takes 132 tokens"):
            session.answer(["y" * 129], settings={})
        with pytest.raises(DataError, match=r"prompt 1: takes 126 tokens for .* and up to 4 for .*; allow 2 with"):
            session.stream("y" * 123, settings={})
        assert session.answer(["y" * 121], settings={})


# ---- streams

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"max_new_tokens": 60},
    {"max_new_tokens": 30, "temperature": 1.5, "top_p": 0.9, "seed": 3},
    {"max_new_tokens": 12, "beams": 3},
    {"max_new_tokens": 30, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("base", [False, True])
def test_a_stream_is_the_answer(run: Path, settings: dict[str, Any], base: bool):
    with runs.open_run(run) as session:
        for prompt in PROMPTS[:3]:
            for raw in (False, True):
                given = {"settings": settings, "base": base, "raw": raw}
                assert "".join(session.stream(prompt, **given)) == session.answer([prompt], **given)[0].text


def test_stop_texts_cut_a_stream_where_they_cut_the_answer(run: Path):
    """Every piece of two and three characters of an answer, which with bytes for tokens straddles several tokens."""
    with runs.open_run(run) as session:
        long = {"max_new_tokens": 24}
        whole = session.answer(["good"], settings=long)[0].text
        stops = {whole[start : start + size] for size in (2, 3) for start in range(1, len(whole) - 3, 2)}
        assert len(stops) > 8
        for stop in stops:
            settings = long | {"stop": ["never comes", stop]}
            answer = session.answer(["good"], settings=settings)[0]
            assert "".join(session.stream("good", settings=settings)) == answer.text
            assert answer.text == whole[: whole.index(stop)] and answer.finished


def test_an_error_while_decoding_reaches_the_reader(run: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("reft_cli.models.slots.prefill", broken)
    with runs.open_run(run) as session, pytest.raises(torch.OutOfMemoryError):
        list(session.stream("good", settings={}))


# ---- heads


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_head_answers_what_evaluation_predicts(trained: Trained, data_dir: Path, kind: str):
    columns = ["data.columns={label: score}"] if kind == "regression" else []
    run = trained(f"task.kind={kind}", "data.template=null", "task.metric=null", "train.epochs=3", *columns)
    report = runs.evaluate(run, base="compare", observer=NullObserver())
    lines = [json.loads(line) for line in report.path.with_suffix(".samples.jsonl").read_text().splitlines()]
    prompts = [json.loads(line)["text"] for line in (data_dir / "test.jsonl").read_text().splitlines()]
    with runs.open_run(run) as session:
        for key, base in (("prediction", False), ("base_prediction", True)):
            expected = [line[key] for line in lines]
            found = texts(session, prompts, base=base)
            if kind == "regression":
                assert [float(each) for each in found] == pytest.approx(expected, abs=1e-4)
            else:
                assert found == expected and set(found) <= {"yes", "no"}
            assert list(session.stream(prompts[0], settings={}, base=base)) == found[:1]
        with pytest.raises(DataError, match="the prompt is empty"):
            texts(session, [""])


# ---- settings

STORED = {"max_new_tokens": 64, "min_new_tokens": 5}


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ({"max_new_tokens": 0}, ["--max-new-tokens: input should be greater than or equal to 1 (got 0)"]),
        ({"max_new_tokens": 2.5}, ["--max-new-tokens: input should be a valid integer (got 2.5)"]),
        ({"max_new_tokens": 4}, ["--max-new-tokens: min_new_tokens 5 is more than max_new_tokens 4"]),
        ({"temperature": "hot\n"}, [r"--temperature: input should be a valid number (got hot\n)"]),
        ({"temperature": float("nan")}, ["--temperature: input should be a finite number (got nan)"]),
        (
            {"temperature": 1e-9},
            ["--temperature: 1e-09 is too near to 0 to be sampled with; write 0, or at least 0.0001"],
        ),
        (
            {"top_p": 0, "top_k": -1},
            [
                "--top-p: input should be greater than 0 (got 0)",
                "--top-k: input should be greater than or equal to 0 (got -1)",
            ],
        ),
        ({"top_p": 0.9, "temperature": 0}, ["--top-p: nothing is sampled at temperature 0; give --temperature too"]),
        ({"top_k": 5}, ["--top-k: nothing is sampled at temperature 0; give --temperature too"]),
        ({"stop": [""]}, ["generation.stop: an empty text would end every answer at once; remove it"]),
        ({"batch_size": 0}, ["--batch-size: input should be greater than or equal to 1 (got 0)"]),
        ({"seed": "x"}, [f"--seed: x is not a whole number from 0 to {2**63 - 1}"]),
        ({"seed": -1}, [f"--seed: -1 is not a whole number from 0 to {2**63 - 1}"]),
        ({"seed": True}, [f"--seed: True is not a whole number from 0 to {2**63 - 1}"]),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], messages: list[str]):
    with pytest.raises(SpecError) as caught:
        merge_generation(STORED, given)
    assert [str(problem) for problem in caught.value.problems] == messages


def test_sampling_is_turned_off_whatever_a_run_samples_from():
    decoding, _ = merge_generation({"temperature": 0.7, "top_p": 0.9, "top_k": 40}, {"temperature": 0})
    assert (decoding.temperature, decoding.top_p, decoding.top_k) == (0, 0.9, 40)


def test_an_unknown_setting_lists_the_known():
    with pytest.raises(
        SpecError, match=r"^generation.tempreature: no such setting; there are max_new_tokens, .*, seed$"
    ):
        merge_generation(STORED, {"tempreature": 1.0})


def test_settings_come_before_what_is_stored_and_none_means_stored():
    decoding, size = merge_generation(STORED, {"max_new_tokens": 9, "temperature": None, "seed": 2**63 - 1})
    assert (decoding.max_new_tokens, decoding.min_new_tokens, decoding.temperature, size) == (9, 5, 0.0, None)
    torch.manual_seed(decoding.seed)


def test_settings_are_checked_by_every_door(run: Path):
    with runs.open_run(run) as session:
        for ask in (session.answer, lambda prompts, **given: session.stream(prompts[0], **given)):
            with pytest.raises(SpecError, match="--max-new-tokens"):
                ask(["good"], settings={"max_new_tokens": 0})
    with pytest.raises(SpecError, match="--max-new-tokens"):
        runs.evaluate(run, generation={"max_new_tokens": 0}, observer=NullObserver())
