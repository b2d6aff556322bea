"""Slots on a GPU: captured steps give what recomputation and plain steps give, with edits, refills and many spans."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import transformers
from tiny_decoding import GREEDY, TOKENIZER, from_slots, headed, intervened, prompt, recomputed

from reft_cli.generation import decode
from reft_cli.generation.decode import Decoder, requests_of
from reft_cli.generation.settings import Decoding, Request
from reft_cli.generation.slots import SlotDecoder
from reft_cli.models.intervened import IntervenedModel
from reft_cli.models.loading import BaseModel, shape_hash
from reft_cli.models.slots import why_nothing_is_kept
from reft_cli.models.stacked import Member, Stack
from reft_cli.positions import Positions
from tiny_models import decoder

pytestmark = pytest.mark.gpu
COMPILED = replace(GREEDY, compile="on")
ASKED = [prompt(1 + 7 * index % 40, seed=index) for index in range(20)]


def on_gpu(family: str = "llama", dtype: torch.dtype = torch.float32) -> BaseModel:
    model = deepcopy(decoder(family)).to("cuda", dtype)
    return BaseModel(model, family, None, shape_hash(model))


def serving(model: IntervenedModel, positions: str) -> Decoder:
    member = Member.of(model, Positions.parse(positions).groups(tied=True))
    stack = Stack(model.base_model, [member])
    return Decoder(model.base_model, stack, tokenizer=TOKENIZER)


@pytest.fixture
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step for every 16 columns, so that one answer needs several."""
    monkeypatch.setitem(__import__("reft_cli.generation.slots", fromlist=["SPANS"]).SPANS, "cuda", 16)


@pytest.mark.usefixtures("short_spans")
@pytest.mark.parametrize("method", ["loreft", "red"])
@pytest.mark.parametrize("positions", ["f3+l3", "all", "generated"])
def test_captured_steps_equal_recomputation(positions: str, method: str):
    model = intervened(positions, base=on_gpu(), method=method).to("cuda")
    decoding = replace(GREEDY, max_new_tokens=30)
    found = from_slots(serving(model, positions), requests_of(ASKED, member=1), decoding, size=6)
    for each, answer in zip(ASKED, found, strict=True):
        assert answer == recomputed(model, each, positions, 30)


@pytest.mark.usefixtures("short_spans")
@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt2", "opt", "qwen3"])
def test_families_equal_recomputation(family: str):
    model = intervened(base=on_gpu(family)).to("cuda")
    found = from_slots(serving(model, "f3+l3"), requests_of(ASKED[:6], member=1), GREEDY, size=3)
    assert found == [recomputed(model, each, "f3+l3", 8) for each in ASKED[:6]]


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(max_new_tokens=20),
        Decoding(max_new_tokens=20, temperature=1.3, top_k=40, top_p=0.9, seed=3),
        Decoding(max_new_tokens=20, repetition_penalty=1.5, no_repeat_ngram_size=3, min_new_tokens=5),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_equal_plain_ones(dtype: torch.dtype, decoding: Decoding, monkeypatch: pytest.MonkeyPatch):
    model = intervened("all", base=on_gpu(dtype=dtype)).to("cuda")
    requests, way = requests_of(ASKED, member=1), serving(model, "all")
    captured = from_slots(way, requests, decoding, size=8)
    assert way._slots is not None and way._slots._graphs
    plain = serving(model, "all")

    def uncaptured(self: SlotDecoder, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)
        self._captures = False

    original = SlotDecoder.__init__
    monkeypatch.setattr(SlotDecoder, "__init__", uncaptured)
    assert from_slots(plain, requests, decoding, size=8) == captured
    assert plain._slots is not None and not plain._slots._graphs


@pytest.mark.parametrize("positions", ["f3+l3", "all"])
def test_prompts_read_by_captured_passes_equal_those_read_plainly(positions: str, monkeypatch: pytest.MonkeyPatch):
    """In half precision products of other sizes round otherwise, so that a few answers may part."""
    model = intervened(positions, base=on_gpu(dtype=torch.float16)).to("cuda")
    requests, way, plain = requests_of(ASKED, member=1), serving(model, positions), serving(model, positions)
    found = from_slots(way, requests, GREEDY, size=1)
    assert way._slots is not None and way._slots._prompts is not None
    assert way._slots._prompts.why_not is None and way._slots._prompts._passes
    monkeypatch.setattr(SlotDecoder, "_new_prompts", lambda self: None)
    wanted = from_slots(plain, requests, GREEDY, size=1)
    assert sum(one == other for one, other in zip(found, wanted, strict=True)) >= 0.8 * len(ASKED)


@pytest.mark.usefixtures("short_spans")
def test_compiled_blocks_equal_plain_ones():
    for positions, component in (("f3+l3", "block_output"), ("all", "block_output"), ("all", "mlp_output")):
        model = intervened(positions, base=on_gpu(), component=component).to("cuda")
        requests = requests_of(ASKED, member=1)
        plain = from_slots(serving(model, positions), requests, GREEDY, size=6)
        way = serving(model, positions)
        for size in (6, 1):
            assert from_slots(way, requests, COMPILED, size=size) == plain
            assert way._slots is not None and way._slots._graphs


@pytest.mark.parametrize("decoding", [GREEDY, COMPILED])
def test_a_merged_checkpoint_equals_recomputation(decoding: Decoding):
    model = intervened("all", base=on_gpu(), method="red", component="mlp_output").to("cuda")
    way = serving(model, "all")
    found = from_slots(way, requests_of(ASKED, member=1), decoding, size=6)
    assert found == [recomputed(model, each, "all", 8) for each in ASKED]
    assert way._merges[1] is not None
    base = from_slots(way, requests_of(ASKED, member=0), decoding, size=6)  # by other captured steps
    assert base != found
    assert from_slots(way, requests_of(ASKED, member=1), decoding, size=6) == found


def test_a_mixed_batch_equals_each_alone():
    base = on_gpu()
    kinds = {
        1: ("f3+l3", {"method": "loreft", "rank": 2, "seed": 1}),
        2: ("all", {"method": "red", "component": "mlp_output", "seed": 2}),
        3: ("generated", {"method": "direft", "rank": 5, "layers": "1", "seed": 3}),
    }
    models = {
        each: intervened(positions, base=base, **options).to("cuda") for each, (positions, options) in kinds.items()
    }
    members = [Member.of(models[each], Positions.parse(kinds[each][0]).groups(tied=True)) for each in kinds]
    together = Decoder(base.model, Stack(base.model, members), tokenizer=TOKENIZER)
    requests = [Request(each.input_ids, index % 4) for index, each in enumerate(ASKED)]
    found = from_slots(together, requests, GREEDY, size=7)
    for request, each, answer in zip(requests, ASKED, found, strict=True):
        if request.member:
            model, positions = models[request.member], kinds[request.member][0]
            assert answer == recomputed(model, each, positions, 8)


def test_a_step_that_cannot_be_captured_is_taken_plainly():
    base = on_gpu()
    model = intervened("all", base=base).to("cuda")

    def read(*_: object) -> None:  # a hook that gives something back would replace the output
        torch.ones(1, device="cuda").item()

    reads = base.model.model.layers[1].mlp.register_forward_hook(read)
    way = serving(model, "all")
    with reads:
        found = from_slots(way, requests_of(ASKED, member=1), GREEDY, size=6)
    assert way._slots is not None and way._slots.why_not_captured and not way._slots._graphs
    assert found == [recomputed(model, each, "all", 8) for each in ASKED]
    torch.cuda.synchronize()
    assert from_slots(serving(model, "all"), requests_of(ASKED, member=1), GREEDY, size=6) == found  # captured again


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_decode_captured_or_plainly(family: str):
    model = intervened(base=on_gpu(family)).to("cuda")
    found = from_slots(serving(model, "f3+l3"), requests_of(ASKED[:6], member=1), GREEDY, size=3)
    assert found == [recomputed(model, each, "f3+l3", 8) for each in ASKED[:6]]


# ---- a head that prompts share


def wide(family: str, dtype: torch.dtype) -> BaseModel:
    """Heads of 32 numbers, which our kernels take."""
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 32}
    shape |= {"intermediate_size": 160, "num_key_value_heads": 2, "max_position_embeddings": 256, "sliding_window": 40}
    config = getattr(transformers, f"{family}Config")(**shape, pad_token_id=1, bos_token_id=0, eos_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).to("cuda", dtype)
    return BaseModel(model, family, None, shape_hash(model))


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Gemma3Text"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_go_on_from_a_head(family: str, dtype: torch.dtype):
    """Logits of prompts that go on from it, and of the steps after, beside those of the whole."""
    assert why_nothing_is_kept(wide(family, dtype).model) is None
    assert "a head of 8 numbers is none of" in str(why_nothing_is_kept(on_gpu(dtype=dtype).model))


@pytest.mark.parametrize("decoding", [GREEDY, COMPILED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", ["f3+l3", "all"])
def test_a_head_is_read_once(positions: str, dtype: torch.dtype, decoding: Decoding, monkeypatch: pytest.MonkeyPatch):
    """In half precision a few answers may part; and reading alone, by captured passes, goes on from no head."""
    model = intervened(positions, base=wide("Llama", dtype)).to("cuda")
    requests, way = requests_of(headed(*range(1, 41)), member=1), serving(model, positions)
    monkeypatch.setattr(decode, "WORTH_TRYING", 0)
    found = from_slots(way, requests, decoding, size=16)
    assert way._slots is not None and way._slots._heads == {1: 18 if positions == "f3+l3" else 20}
    alone = from_slots(way, requests, decoding, size=1)
    monkeypatch.setattr(Decoder, "_may_keep", lambda *_: False)
    whole = serving(model, positions)
    wanted = from_slots(whole, requests, decoding, size=16)
    assert whole._slots is not None and not whole._slots._heads
    for answers in (found, alone):
        same = sum(one == other for one, other in zip(answers, wanted, strict=True))
        assert same == 40 if dtype == torch.float32 else same >= 30


def test_little_is_not_worth_a_trial_of_kernels():
    model = intervened(base=wide("Llama", torch.bfloat16)).to("cuda")
    way = serving(model, "f3+l3")
    from_slots(way, requests_of(headed(3, 5, 7), member=1), GREEDY, size=3)
    assert way._keeps is None and way._slots is not None and not way._slots._heads
