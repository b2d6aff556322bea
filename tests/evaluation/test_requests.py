"""Requests of an evaluation harness: edits go by the context, whatever else is in the batch."""

import copy

import pytest
import torch

from reft_cli.data.batch import build_batch
from reft_cli.data.examples import Example
from reft_cli.errors import DataError, SpecError
from reft_cli.evaluation import requests as module
from reft_cli.evaluation.requests import Continuation, Requests
from reft_cli.generation.decode import Decoder
from reft_cli.generation.settings import Answer, Decoding
from reft_cli.models.build import build_intervened
from reft_cli.positions import Positions
from reft_cli.tasks.objectives import CausalLM
from tiny_models import base_of, byte_tokenizer

PAIRS = [("Review: good ->", " yes"), ("a", " no, not at all"), ("Q", "x"), ("some longer context than others", " y z")]


def requests(positions="f2+l2", *, family="llama", batch_size=4, edited=True, tokenizer=None, tied=True):
    parsed = Positions.parse(positions)
    model = build_intervened(
        base_of(family),
        method="direft",
        layers="all",
        component="block_output",
        positions=parsed,
        tied=tied,
        rank=4,
        init="paper",
        dropout=0.0,
        dropout_on="delta",
        seed=0,
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.bank.refresh()
    groups, tokenizer = parsed.groups(tied=tied), tokenizer or byte_tokenizer(bos=True)
    return Requests(
        model=model,
        decoder=Decoder.of(model, groups, tokenizer=tokenizer),
        groups=groups,
        tokenizer=tokenizer,
        batch_size=batch_size,
        edited=edited,
    )


def asked(answering, pairs=PAIRS):
    return [
        Continuation(answering.ids(context, special=True), answering.ids(answer, special=False))
        for context, answer in pairs
    ]


def scores(answering, pairs=PAIRS):
    with answering.model:
        return [each.log_probability for each in answering.likelihoods(asked(answering, pairs))]


@pytest.mark.parametrize("positions", ["f2+l2", "l1", "prompt", "generated", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_scores_do_not_change_with_the_batch(positions, family):
    alone = scores(requests(positions, family=family, batch_size=1))
    for size in (2, 16):
        assert scores(requests(positions, family=family, batch_size=size)) == pytest.approx(alone, abs=2e-5)
    swapped = scores(requests(positions, family=family, batch_size=3), PAIRS[::-1])
    assert swapped[::-1] == pytest.approx(alone, abs=2e-5)


SHOTS = "Review: bad -> no. Review: fine -> yes. "
CHOICES = [
    (SHOTS + f"Review: {text} ->", answer) for text in ("good", "too long by far", "x") for answer in (" yes", " n")
]


@pytest.mark.parametrize("positions", ["f2+l2", "l1", "prompt", "generated", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_contexts_that_begin_alike_are_read_once(positions, family, monkeypatch):
    alone = scores(requests(positions, family=family, batch_size=1), CHOICES)
    read, plain = [], module.build_batch

    def building(examples, **given):
        batch = plain(examples, **given)
        read.append(batch.inputs["input_ids"].numel())
        return batch

    monkeypatch.setattr(module, "build_batch", building)
    answering = requests(positions, family=family, batch_size=8)
    assert scores(answering, CHOICES) == pytest.approx(alone, abs=2e-5)
    lengths = [len(each.context) + len(each.continuation) - 1 for each in asked(answering, CHOICES)]
    assert len(read) == 1 and read[0] < 0.5 * sum(lengths)


def test_the_padding_side_of_the_tokenizer_does_not_matter():
    left, right = copy.deepcopy(byte_tokenizer(bos=True)), copy.deepcopy(byte_tokenizer(bos=True))
    left.padding_side, right.padding_side = "left", "right"
    found = [requests(tokenizer=each) for each in (left, right)]
    assert scores(found[0]) == scores(found[1])
    texts = []
    for each in found:
        with each.model:
            texts.append(each.generate([context for context, _ in PAIRS], [{"max_gen_toks": 5}] * len(PAIRS)))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("positions", ["f2+l2", "all"])
def test_a_score_is_the_loss_that_training_has(positions):
    answering = requests(positions)
    for context, answer in PAIRS:
        prompt, completion = answering.ids(context, special=True), answering.ids(answer, special=False)
        example = Example(prompt + completion, len(prompt), None, context, answer, 1)
        batch = build_batch([example], groups=answering.groups, layout="padded", pad_token_id=1)
        with answering.model, torch.no_grad(), answering.model.editing(batch.rows):
            loss = float(CausalLM().loss(answering.model, batch))
        assert scores(answering, [(context, answer)]) == pytest.approx([-loss], abs=1e-5)


def test_without_edits_it_is_the_base_model():
    answering = requests(edited=False)
    for (context, answer), found in zip(PAIRS, scores(answering), strict=True):
        prompt, completion = answering.ids(context, special=True), answering.ids(answer, special=False)
        with torch.no_grad():
            logits = base_of("llama").model(torch.tensor([prompt + completion])).logits[0]
        table = torch.log_softmax(logits[len(prompt) - 1 : -1].float(), dim=-1)
        assert found == pytest.approx(float(table[range(len(completion)), completion].sum()), abs=1e-5)
    assert scores(answering) != pytest.approx(scores(requests()), abs=1e-2)


def test_greedy_says_whether_the_model_would_write_it():
    answering = requests()
    context = PAIRS[0][0]
    with answering.model:
        prompt = answering.ids(context, special=True)
        batch = build_batch(
            [Example(prompt, len(prompt), None, "", "", 1)], groups=answering.groups, layout="padded", pad_token_id=1
        )
        with torch.no_grad(), answering.model.editing(batch.rows):
            best = int(answering.model.base_model(**batch.inputs).logits[0, -1].argmax())
        likely, other = answering.likelihoods([Continuation(prompt, [best]), Continuation(prompt, [(best + 1) % 300])])
    assert likely.greedy and not other.greedy


def test_without_a_prompt_only_edits_of_all_tokens_are_made():
    pairs = [Continuation([0], [5, 6, 7], prompted=False), Continuation([0], [9], prompted=False)]

    def found(**how):
        answering = requests(**how)
        with answering.model:
            answers = [each.log_probability for each in answering.likelihoods(pairs)]
        assert answering.unprompted == 2
        return answers

    assert found(positions="f2+l2") == found(edited=False)
    assert found(positions="all") != pytest.approx(found(edited=False), abs=1e-2)


def test_a_long_context_loses_its_beginning_and_nothing_else():
    answering = requests("l2")
    room = answering.max_length
    assert room == 128
    answer = [7, 8]
    long, short = [5] * 400, [5] * (room - 1)  # one token more than the model takes: the last is a target only
    with answering.model:
        cut, whole = answering.likelihoods([Continuation(long, answer), Continuation(short, answer)])
    assert cut.log_probability == pytest.approx(whole.log_probability, abs=1e-5)
    with pytest.raises(DataError, match="a continuation of 129 tokens"):
        answering.likelihoods([Continuation([5], [6] * 129)])


def test_nothing_to_continue_with_is_certain():
    (found,) = requests().likelihoods([Continuation([5, 6], [])])
    assert (found.log_probability, found.greedy) == (0.0, True)


def test_progress_is_told():
    answering, told = requests(batch_size=3), []
    answering.on_progress = lambda done, total: told.append((done, total))
    with answering.model:
        answering.likelihoods(asked(answering))
        answering.generate(["a"], [{"max_gen_toks": 2}])
    assert told == [(1, 4), (4, 4), (5, 5)]


def test_texts_are_written_as_each_request_says():
    contexts = ["a", "bb", "ccc"]
    answering = requests()
    settings = [
        {"max_gen_toks": 6, "until": ["\n"]},
        {"max_new_tokens": 3, "do_sample": False},
        {"max_gen_toks": 6, "until": "\n"},
    ]
    with answering.model:
        together = answering.generate(contexts, settings)
        alone = [answering.generate([context], [each])[0] for context, each in zip(contexts, settings, strict=True)]
    assert together == alone and len(together) == 3


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"frequency": 1}, SpecError, "a task sets frequency for generation, which reft does not know; it knows until"),
        ({"max_gen_toks": 128}, DataError, "a task writes up to 128 tokens, and the model takes 128 in all"),
    ],
)
def test_settings_that_cannot_be(settings, error, message):
    with pytest.raises(error) as caught:
        requests().generate(["a"], [settings])
    assert message in str(caught.value)


def test_first_tokens_stand_once():
    answering = requests()
    plain = answering.ids("ab", special=False)
    assert answering.ids("ab", special=True) == [0, *plain]
    assert answering.ids("<eos>ab", special=True) == [0, *plain]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, Decoding(max_new_tokens=256)),
        ({"temperature": 0.6, "max_gen_toks": 3}, Decoding(max_new_tokens=3, temperature=0.6)),
        ({"temperature": 0.6, "do_sample": False}, Decoding(max_new_tokens=256)),
        ({"do_sample": True, "until": "x"}, Decoding(max_new_tokens=256, temperature=1.0, stop=("x",))),
        ({"temperature": 0, "until": ["a", "", "b"], "top_p": None}, Decoding(max_new_tokens=256, stop=("a", "b"))),
        (
            {"max_tokens": 9, "min_new_tokens": 1, "top_p": 0.5, "top_k": 4, "num_beams": 2, "use_cache": True}
            | {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
            Decoding(9, 1, top_p=0.5, top_k=4, beams=2, repetition_penalty=1.5, no_repeat_ngram_size=3),
        ),
    ],
)
def test_a_task_s_settings_are_ours_by_other_names(settings, wanted, monkeypatch):
    def answer_all(_, prompts, *, decoding, batch_size):
        seen.append(decoding)
        return [Answer("", 0, True)] * len(prompts)

    seen = []
    monkeypatch.setattr(module, "answer_all", answer_all)
    monkeypatch.setattr(Requests, "max_length", 512)
    requests().generate(["a"], [settings])
    assert seen == [wanted]
