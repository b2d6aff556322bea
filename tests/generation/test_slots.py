"""Slots: every step has the logits of a recomputation, whoever stands beside, and whichever checkpoint edits a row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_decoding import (
    GREEDY,
    PROMPTS,
    TOKENIZER,
    from_slots,
    headed,
    intervened,
    prompt,
    recomputed,
    step_logits,
    tokens,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode

from reft_cli.generation import prompts, slots
from reft_cli.generation.choose import Chooser
from reft_cli.generation.decode import Decoder, requests_of
from reft_cli.generation.prompts import Pass, PromptGraphs
from reft_cli.generation.settings import Decoding, Request
from reft_cli.generation.slots import SlotDecoder
from reft_cli.models import attention
from reft_cli.models.intervened import IntervenedModel
from reft_cli.models.packing import packing_inputs
from reft_cli.models.slots import try_slots, why_nothing_is_kept
from reft_cli.models.stacked import Member, Stack
from reft_cli.positions import Positions
from tiny_models import DECODERS, base_of, decoder

EQUAL = {"rtol": 1e-4, "atol": 1e-4}  # float32, sums in another order
LONG = Decoding(max_new_tokens=12, min_new_tokens=12)


@contextmanager
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Logits of every choice that is made."""
    seen: list[Tensor] = []
    plain = Chooser.choose

    def choose(self: Chooser, logits: Tensor, **state: Tensor) -> Tensor:
        seen.append(logits.clone())
        return plain(self, logits, **state)

    with monkeypatch.context() as patch:
        patch.setattr(Chooser, "choose", choose)
        yield seen


@pytest.mark.parametrize("positions", ["f3+l3", "all"])
@pytest.mark.parametrize("family", sorted(DECODERS.keys() - {"gemma2"}))
def test_logits_of_every_step_are_those_of_a_recomputation(
    family: str, positions: str, monkeypatch: pytest.MonkeyPatch
):
    model, asked = intervened(positions, family=family), prompt(9)
    with watching(monkeypatch) as seen:
        answer = tokens(model, [asked], positions, LONG)[0]
    assert len(seen) == len(answer) == 12
    for count, logits in enumerate(seen):
        wanted = step_logits(model, asked.input_ids + answer[:count], 9, positions)
        torch.testing.assert_close(logits[0], wanted, **EQUAL)


@pytest.mark.parametrize(("slots", "prompts"), [(1, 5), (2, 9), (3, 14), (16, 14)])
def test_answers_do_not_depend_on_the_queue(slots: int, prompts: int, monkeypatch: pytest.MonkeyPatch):
    model = intervened("all")
    asked = [prompt(1 + 5 * index % 13, seed=index) for index in range(prompts)]
    whole = [recomputed(model, each, "all", 8) for each in asked]
    ends = {answer[index % 8] for index, answer in enumerate(whole)}
    monkeypatch.setattr(model.base_model.generation_config, "eos_token_id", sorted(ends))
    wanted = [each[: next((at for at, token in enumerate(each) if token in ends), 7) + 1] for each in whole]
    assert len({len(each) for each in wanted}) > 2  # so slots are filled again one by one
    assert tokens(model, asked, "all", GREEDY, size=slots) == wanted


def test_a_finished_slot_takes_the_next_prompt_at_once():
    model = intervened()
    decoder = Decoder.of(model, Positions.parse("f3+l3").groups(tied=True), tokenizer=TOKENIZER)
    asked = [prompt(3 + index % 7, seed=index) for index in range(40)]
    lengths = [len(each) for each in from_slots(decoder, requests_of(asked, member=1), GREEDY, size=4)]
    assert decoder._slots is not None
    assert decoder._slots.steps < sum(lengths) / 4 + 8 + 40 / 4  # of a full batch, its tail, and the first tokens


def test_what_stands_in_the_cache_is_not_seen_by_those_who_come_after():
    model, short = intervened("all"), prompt(2)
    decoder = Decoder.of(model, Positions.parse("all").groups(tied=True), tokenizer=TOKENIZER)
    alone = from_slots(decoder, requests_of([short], member=1), LONG)
    after = from_slots(decoder, requests_of([prompt(40), short], member=1), LONG, size=1)
    assert after[1] == alone[0]


# ---- several checkpoints

MIXED = {
    1: ("f3+l3", {"method": "loreft", "rank": 2, "seed": 1}),
    2: ("all", {"method": "red", "component": "mlp_output", "seed": 2}),
    3: ("l1", {"method": "direft", "rank": 5, "layers": "1", "seed": 3}),
    4: ("generated", {"method": "noreft", "rank": 3, "component": "attention_output", "seed": 4}),
    5: ("prompt", {"method": "consreft", "rank": 1, "component": "mlp_activation", "layers": "0;2", "seed": 5}),
    6: ("all", {"method": "lobireft", "rank": 2, "component": "block_input", "seed": 6}),
    7: ("all", {"method": "red", "seed": 7}),
}


def mixed() -> tuple[dict[int, IntervenedModel], Decoder]:
    models = {member: intervened(positions, **options) for member, (positions, options) in MIXED.items()}
    members = [Member.of(models[each], Positions.parse(MIXED[each][0]).groups(tied=True)) for each in sorted(MIXED)]
    base = decoder("llama")
    return models, Decoder(base, Stack(base, members), tokenizer=TOKENIZER)


def plain(ids: list[int], steps: int) -> list[int]:
    """The base model's own answer."""
    found = decoder("llama").generate(torch.tensor([ids]), max_new_tokens=steps, do_sample=False, pad_token_id=1)
    return found[0, len(ids) :].tolist()


@pytest.mark.parametrize("way", ["slots", "whole"])
@pytest.mark.parametrize("size", [3, 24])
def test_a_mixed_batch_equals_each_alone(size: int, way: str):
    models, together = mixed()
    asked = [(member, prompt(length, seed=member)) for length in (1, 4, 9) for member in (0, *sorted(MIXED))]
    settings = GREEDY if way == "slots" else replace(GREEDY, use_cache=False)
    requests = [Request(each.input_ids, member) for member, each in asked]
    progress = together.progress(requests, decoding=settings, batch_size=size)
    found = {each.index: each.tokens for each in progress if each.done}
    for index, (member, each) in enumerate(asked):
        if member:
            wanted = recomputed(models[member], each, MIXED[member][0], 8)
        else:
            wanted = plain(each.input_ids, 8)
        assert found[index][: len(wanted)] == wanted, (member, len(each.input_ids))
    assert len({tuple(found[index]) for index in range(16, 24)}) == 8  # eight models, eight answers


def test_untied_groups_keep_their_own_weights():
    model = intervened("f2+l2", tied=False)
    groups = Positions.parse("f2+l2").groups(tied=False)
    found = from_slots(Decoder.of(model, groups, tokenizer=TOKENIZER), requests_of(PROMPTS, member=1), GREEDY)
    for each, answer in zip(PROMPTS, found, strict=True):
        ids, new = list(each.input_ids), []
        for _ in answer:
            rows = {group.name: torch.tensor(group.indices(each.prompt_length, len(ids))).long() for group in groups}
            with torch.no_grad(), model, model.editing(rows):
                new.append(int(model.base_model(torch.tensor([ids])).logits[0, -1].argmax()))
            ids.append(new[-1])
        assert answer == new


# ---- compiled, and what is left behind, and who cannot


@pytest.mark.parametrize(
    ("positions", "component"),
    [("all", "mlp_output"), pytest.param("f3+l3", "block_output", marks=pytest.mark.slow)],
)
def test_compiled_parts_decode_like_plain_ones(positions: str, component: str, monkeypatch: pytest.MonkeyPatch):
    """With torch's own interpreter behind the compiler: what is traced is tested, not the code generator."""
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda made, **_: compile_with(made, backend="eager", dynamic=True))
    monkeypatch.setattr(attention, "_by_length", torch.compiler.disable(attention._by_length))  # reads lengths
    model = intervened(positions, component=component)
    stack = Stack(model.base_model, [Member.of(model, Positions.parse(positions).groups(tied=True))])
    serving = Decoder(model.base_model, stack, tokenizer=TOKENIZER)
    asked = [prompt(4), prompt(4, seed=1), prompt(9)]
    found = from_slots(serving, requests_of(asked, member=1), replace(GREEDY, compile="on"), size=2)
    assert serving._slots is not None and serving._slots.compiles
    assert found == [recomputed(model, each, positions, 8) for each in asked]
    assert not any(hasattr(each, "slot_layer") or "forward" in vars(each) for each in model.base_model.modules())


def test_steps_captured_over_weights_that_have_moved_are_forgotten():
    model = intervened()
    serving = Decoder.of(model, Positions.parse("f3+l3").groups(tied=True), tokenizer=TOKENIZER)
    wanted = from_slots(serving, requests_of([prompt(4)], member=1), GREEDY)
    assert serving._slots is not None
    serving._slots._graphs[(32, False, False)] = object()  # type: ignore[assignment]  # one like it
    assert from_slots(serving, requests_of([prompt(4)], member=1), GREEDY) == wanted and serving._slots._graphs
    weight = model.base_model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.clone()
    assert from_slots(serving, requests_of([prompt(4)], member=1), GREEDY) == wanted and not serving._slots._graphs


def test_a_reader_who_stops_leaves_the_model_as_it_was():
    model = intervened("all")
    base = model.base_model
    wanted = plain([5, 6, 7], 8)
    decoder_of_it = Decoder.of(model, Positions.parse("all").groups(tied=True), tokenizer=TOKENIZER)
    progress = decoder_of_it.progress(requests_of([prompt(5)], member=1), decoding=LONG, batch_size=1)
    assert not next(progress).done
    assert not torch.is_inference_mode_enabled()
    progress.close()
    assert base.config._attn_implementation == "sdpa"
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in base.modules())
    assert not any(hasattr(each, "slot_layer") or "forward" in vars(each) for each in base.modules())
    assert plain([5, 6, 7], 8) == wanted
    assert tokens(model, [prompt(5)], "all", GREEDY) == [recomputed(model, prompt(5), "all", 8)]


def test_who_cannot_decode_from_slots_is_told_and_goes_through_generate():
    assert try_slots(decoder("gemma2")).reason == "its attention uses softcap"
    model = intervened(family="gemma2")
    found = Decoder.of(model, Positions.parse("f3+l3").groups(tied=True), tokenizer=TOKENIZER)
    assert found.why_not_slots(GREEDY) == "its attention uses softcap"
    assert found.why_not_slots(replace(GREEDY, beams=2)) == "beams need a search of their own"
    assert found.why_not_slots(replace(GREEDY, use_cache=False)) == "use_cache is off"
    progress = found.progress(requests_of(PROMPTS, member=1), decoding=GREEDY, batch_size=2)
    answers = {each.index: each.tokens for each in progress}
    for index, each in enumerate(PROMPTS):
        wanted = recomputed(model, each, "f3+l3", 8)
        assert answers[index][: len(wanted)] == wanted


def test_a_model_whose_logits_change_is_found_out(monkeypatch: pytest.MonkeyPatch):
    model = base_of("llama").model
    monkeypatch.setattr(type(model), "forward", shifting(type(model).forward))
    assert try_slots(model).reason == "its logits change when it decodes from slots"


def shifting(forward):
    def shifted(self, *args, position_ids=None, **kwargs):
        wrong = None if position_ids is None else position_ids * 3
        return forward(self, *args, position_ids=wrong, **kwargs)

    return shifted


def test_one_decoder_serves_calls_of_any_size():
    model = intervened()
    serving = Decoder.of(model, Positions.parse("f3+l3").groups(tied=True), tokenizer=TOKENIZER)
    for asked in ([prompt(4)], [prompt(60), prompt(3)], [prompt(4)], [prompt(90)]):
        found = from_slots(serving, requests_of(asked, member=1), GREEDY)
        assert found == [recomputed(model, each, "f3+l3", 8) for each in asked]


def test_slots_that_fit_are_kept_between_calls():
    model = intervened()
    serving = Decoder.of(model, Positions.parse("f3+l3").groups(tied=True), tokenizer=TOKENIZER)
    kept: list[SlotDecoder | None] = []
    for length in (4, 30, 5, 60):
        from_slots(serving, requests_of([prompt(length)], member=1), GREEDY)
        kept.append(serving._slots)
    assert kept[0] is kept[1] is kept[2] is not kept[3]


def test_a_merged_checkpoint_decodes_without_edits():
    model = intervened("all", method="red", component="mlp_output")
    serving = Decoder.of(model, Positions.parse("all").groups(tied=True), tokenizer=TOKENIZER)
    found = from_slots(serving, requests_of(PROMPTS, member=1), GREEDY)
    assert found == [recomputed(model, each, "all", 8) for each in PROMPTS]
    assert serving._merges[1] is not None and serving._slots is not None and not serving._slots._edits
    mixed_ones = [Request(each.input_ids, member) for each in PROMPTS for member in (0, 1)]  # then hooks do it
    assert from_slots(serving, mixed_ones, GREEDY)[1::2] == found
    assert serving._slots._edits


@pytest.mark.parametrize(
    ("family", "decoding"),
    [(family, GREEDY) for family in sorted(DECODERS.keys() - {"gemma2", "mixtral", "qwen3_moe"})]
    + [
        ("llama", Decoding(max_new_tokens=9, temperature=1.0, top_k=5, top_p=0.8)),
        ("llama", Decoding(max_new_tokens=9, repetition_penalty=1.4, no_repeat_ngram_size=2, min_new_tokens=3)),
    ],
)
def test_a_step_reads_no_value_so_it_can_be_captured(family: str, decoding: Decoding):
    serving = Decoder.of(
        intervened("all", family=family), Positions.parse("all").groups(tied=True), tokenizer=TOKENIZER
    )
    progress = serving.progress(requests_of(PROMPTS, member=1), decoding=decoding, batch_size=3)
    next(progress)
    assert serving._slots is not None and serving._slots._edits
    with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):  # an error for what depends on a value
        serving._slots._advance()
    progress.close()


# ---- prompts that are read by themselves


@pytest.fixture
def played_back(monkeypatch: pytest.MonkeyPatch) -> list[PromptGraphs]:
    """Captured passes as they are on a GPU, but that a replay runs the pass; all makers of them."""
    made: list[PromptGraphs] = []

    def new_prompts(self: SlotDecoder) -> PromptGraphs:
        parts = (self.model, self.cache, self.stack, self.state, self.chooser)
        made.append(PromptGraphs(*parts, limit=self.decoding.max_new_tokens))
        return made[-1]

    def capture(self: PromptGraphs, key: tuple[int, int, bool], given: Tensor) -> bool:
        self._inputs.setdefault(key[0], packing_inputs([key[0]]))
        self._pass(key, given)
        numbers = torch.full_like(given, 7)  # what is captured may not depend on what stands there
        graph = SimpleNamespace(replay=lambda: self._pass(key, numbers))
        self._passes[key] = Pass(graph, numbers)  # type: ignore[arg-type]
        return True

    monkeypatch.setattr(SlotDecoder, "_new_prompts", new_prompts)
    monkeypatch.setattr(PromptGraphs, "_capture", capture)
    return made


@pytest.mark.parametrize("positions", ["f3+l3", "l1", "all", "prompt", "generated"])
@pytest.mark.parametrize("slots", [1, 3])
def test_prompts_read_alone_are_filled_up(positions: str, slots: int, played_back: list[PromptGraphs]):
    model = intervened(positions)
    asked = [prompt(length, seed=length) for length in (5, 1, 2, 3, 63, 64, 65, 20, 90)]
    found = tokens(model, asked, positions, GREEDY, size=slots)
    assert found == [recomputed(model, each, positions, 8) for each in asked]
    assert len(played_back) == 1 and (slots == 3 or {width for width, *_ in played_back[0]._passes} == {64, 128})


def test_prompts_read_alone_are_drawn_and_penalised_alike(played_back: list[PromptGraphs]):
    settings = Decoding(max_new_tokens=8, temperature=1.2, repetition_penalty=1.4, no_repeat_ngram_size=2, seed=3)
    model, asked = intervened(), [prompt(length, seed=length) for length in (5, 9, 12, 30)]
    alone = tokens(model, asked, "f3+l3", settings, size=1)
    assert len(played_back[0]._passes) == 1
    assert alone == tokens(model, asked, "f3+l3", settings, size=4)


def test_a_captured_pass_that_leaves_something_else_is_not_used(
    played_back: list[PromptGraphs], monkeypatch: pytest.MonkeyPatch
):
    def replay(self: PromptGraphs, key: tuple[int, int, bool], given: Tensor) -> bool:
        wrong = given.clone()
        wrong[0] += 1
        self._pass(key, wrong)
        return True

    monkeypatch.setattr(PromptGraphs, "_replay", replay)
    model, asked = intervened(), [prompt(9, seed=seed) for seed in range(6)]
    settings = replace(GREEDY, repetition_penalty=1.01)  # so that the slot's state has the prompt's tokens
    found = tokens(model, asked, "f3+l3", settings, size=1)
    monkeypatch.setattr(SlotDecoder, "_new_prompts", lambda self: None)
    assert found == tokens(model, asked, "f3+l3", settings, size=1)
    assert played_back[0].why_not == "a captured pass left something else" and not played_back[0]._passes


@pytest.mark.parametrize(("name", "value"), [("LONGEST", 100), ("longest_sequence", lambda model: 120)])
def test_prompts_that_cannot_be_filled_up_are_not(
    name: str, value: object, played_back: list[PromptGraphs], monkeypatch: pytest.MonkeyPatch
):
    """Long ones, and those at the end of a model's learned positions: 90 tokens would be 128."""
    monkeypatch.setattr(prompts, name, value)
    model, asked = intervened(family="gpt2"), [prompt(90, seed=seed) for seed in range(3)]
    assert tokens(model, asked, "f3+l3", GREEDY, size=1) == [recomputed(model, each, "f3+l3", 8) for each in asked]
    assert len(played_back) == 1 and not played_back[0]._passes


# ---- a head that prompts share


@contextmanager
def counting_tokens(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens that each pass over prompts reads."""
    read: list[int] = []
    plain_prefill = slots.prefill

    def counted(model, cache, prompts, places, **kept):
        read.append(sum(map(len, prompts)))
        return plain_prefill(model, cache, prompts, places, **kept)

    with monkeypatch.context() as patch:
        patch.setattr(slots, "prefill", counted)
        yield read


@pytest.mark.parametrize("positions", ["f3+l3", "prompt", "all", "l1", "f25"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3"])
def test_a_head_that_prompts_share_is_read_once(family: str, positions: str, monkeypatch: pytest.MonkeyPatch):
    model, asked = intervened(positions, family=family), headed(1, 4, 9, 4, 12, 2, 7)
    with counting_tokens(monkeypatch) as read:
        found = tokens(model, asked, positions, GREEDY, size=3)
    head = 18 if positions == "f3+l3" else 20  # three from the end of the shortest
    assert read[0] == head and sum(read) == head + sum(each.prompt_length - head for each in asked)
    assert found == [recomputed(model, each, positions, 8) for each in asked]


def test_a_head_lasts_for_one_call():
    model = intervened("all")
    serving = Decoder.of(model, Positions.parse("all").groups(tied=True), tokenizer=TOKENIZER)
    heads = []
    for asked in (headed(3, 5), [prompt(22), prompt(21)], headed(2), headed(6, 6, 1), [prompt(22)] * 2):
        assert serving.why_not_slots(GREEDY) is None
        for member, wanted in ((1, lambda each: recomputed(model, each, "all", 8)), (0, lambda each: plain(each, 8))):
            found = from_slots(serving, requests_of(asked, member=member), GREEDY, size=2)
            for each, answer in zip(asked, found, strict=True):
                expected = wanted(each if member else each.input_ids)
                assert answer[: len(expected)] == expected
            assert serving._slots is not None
            heads.append(serving._slots._heads.get(member))
    assert heads == [20, 20, None, None, None, None, 20, 20, 21, 21]
    assert not any("slot_begun" in vars(each) for each in model.base_model.modules())


def test_each_checkpoint_reads_its_head(monkeypatch: pytest.MonkeyPatch):
    models, together = mixed()
    asked = [(member, each) for each in headed(3, 5, 4) for member in (0, 1, 2)] + [(5, headed(3)[0])]
    requests = [Request(each.input_ids, member) for member, each in asked]
    with counting_tokens(monkeypatch) as read:
        found = from_slots(together, requests, GREEDY, size=7)
    heads = {0: 20, 1: 20, 2: 20, 5: 0}
    assert sum(read) == sum(heads.values()) + sum(each.prompt_length - heads[member] for member, each in asked)
    for (member, each), answer in zip(asked, found, strict=True):
        wanted = recomputed(models[member], each, MIXED[member][0], 8) if member else plain(each.input_ids, 8)
        assert answer[: len(wanted)] == wanted


def test_several_answers_to_a_prompt_read_it_once(monkeypatch: pytest.MonkeyPatch):
    model, settings = intervened(), Decoding(max_new_tokens=6, temperature=1.0, repetition_penalty=1.3)
    decoder_of_it = Decoder.of(model, Positions.parse("f3+l3").groups(tied=True), tokenizer=TOKENIZER)
    requests = [Request(headed(9)[0].input_ids, 1, sample) for sample in range(4)]
    with counting_tokens(monkeypatch) as read:
        together = from_slots(decoder_of_it, requests, settings, size=2)
    assert sum(read) == 28 + 4
    assert together == [from_slots(decoder_of_it, [each], settings)[0] for each in requests]
    assert len(set(map(tuple, together))) > 1


def test_attention_that_knows_no_head_reads_prompts_whole(monkeypatch: pytest.MonkeyPatch):
    by_length = attention._by_length

    def headless(*args: object, **kwargs: object) -> Tensor:
        if args[7] is not None:
            raise attention.NotPackable("it knows no head")
        return by_length(*args, **kwargs)

    monkeypatch.setattr(attention, "_by_length", headless)
    model, asked = intervened(), headed(3, 5)
    assert why_nothing_is_kept(model.base_model) == "it knows no head"
    with counting_tokens(monkeypatch) as read:
        assert tokens(model, asked, "f3+l3", GREEDY) == [recomputed(model, each, "f3+l3", 8) for each in asked]
    assert read == [48]
