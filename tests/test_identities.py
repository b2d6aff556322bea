"""Numerical identities that any implementation of ReFT owes its users; "here" and the tests named hold them.

 1. Cached decoding with prompt edits = recomputation: test_slots_equal_recomputation_whatever_stands_beside,
    test_families_decode_as_they_recompute, test_components_decode_as_they_recompute,
    test_beams_equal_beams_without_a_cache; scores, static cache and chunked prefill here.
 2. Left-padded = right-padded = unpadded, a row of a batch = the row alone: here;
    packed too: test_padded_packed_and_single_give_one_loss_and_one_gradient.
 3. `all` = a list of every position, padding untouched, a shared prefix sees nothing of the rest: here;
    test_block_output_is_h_plus_delta_at_the_rows_and_h_elsewhere.
 4. Algebra of the edit: test_folded_is_the_delta, test_w_equal_to_r_and_no_bias_is_the_identity,
    test_loreft_writes_the_source_into_its_subspace, test_only_the_subspace_changes,
    test_consreft_twice_is_consreft_once.
 5. R stays orthonormal: test_rows_stay_orthonormal_for_a_thousand_steps; after loading, and training on, here.
 6. Weight decay leaves R alone: test_decay_alone_does_not_touch_r, test_undecayed.
 7. Eval mode is deterministic, modes reach every part: test_no_dropout_in_eval_mode; whole models here.
 8. Saved and loaded, the logits are the same bits: here, every method and component;
    whole runs: test_every_method_trains_and_reloads_to_the_same_answers.
 9. N + M steps = N steps, save, load, M steps: test_resumed_training_is_bitwise,
    test_interrupted_and_resumed_is_bitwise_the_whole, test_twelve_faults_change_nothing.
11. Positions: test_positions (pyreft's, where it edits each token once), test_positions_are_inside_and_never_twice;
    `l1` in every format here.
12. Published parameter counts: test_published_counts; of whole models here.
13. The last number of an answer: test_numeric_match_compares_the_last_numbers.
14. The last layer learns from the last prompt token only: test_last_layer_trains_only_what_the_loss_can_see,
    and here with one set of weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reft_cli.checkpoint import InterventionIdentity, TextIdentity, read_checkpoint, write_checkpoint
from reft_cli.data.batch import build_batch
from reft_cli.data.encode import Example, encode_examples
from reft_cli.data.formats import choose_format
from reft_cli.data.records import Rows
from reft_cli.data.templates import Inline, choose_template
from reft_cli.generation.decode import requests_of
from reft_cli.generation.settings import Decoding
from reft_cli.generation.whole import PassEdits, config_of, edits_while_generating
from reft_cli.interventions import METHODS
from reft_cli.layers import COMPONENTS
from reft_cli.models.build import build_intervened
from reft_cli.models.intervened import IntervenedModel
from reft_cli.models.stacked import Member, Stack
from reft_cli.positions import Positions
from reft_cli.runs.assemble import build_from_checkpoint, describe_base
from small_tokenizers import byte_level
from tiny_models import DECODERS, ENCODERS, base_of, byte_tokenizer

EQUAL = {"rtol": 1e-5, "atol": 2e-6}  # float32 sums in another order; logits are of size 1
BITWISE = {"rtol": 0, "atol": 0}


def intervened(
    family: str = "llama", *, positions: str = "f2+l2", method: str = "loreft", component: str = "block_output", **given
) -> IntervenedModel:
    """A tiny model with an intervention away from its start."""
    values = {"layers": "all", "tied": True, "init": "paper", "dropout": 0.0, "dropout_on": "delta", "seed": 0} | given
    values |= {"rank": None if method == "red" else 2}
    model = build_intervened(
        base_of(family), method=method, component=component, positions=Positions.parse(positions), **values
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def example(length: int, *, prompt: int | None = None, seed: int = 0, row: int = 1) -> Example:
    ids = [(11 * token + 5 * length + seed) % 290 + 2 for token in range(length)]
    return Example(ids, prompt or length, None, "", "", row)


def groups(positions: str) -> tuple:
    return Positions.parse(positions).groups(tied=True)


def logits(model: IntervenedModel, examples: list[Example], positions: str = "f2+l2") -> list[Tensor]:
    """Logits of the real tokens of each example, right-padded in one batch."""
    followed = [replace(each, input_ids=each.input_ids + [9] * bool(each.learned)) for each in examples]
    batch = build_batch(followed, groups=groups(positions), layout="padded", pad_token_id=1)
    with torch.no_grad(), model, model.editing(batch.rows):
        found = model.base_model(**batch.inputs).logits
    return [row[: len(each.input_ids)] for row, each in zip(found, examples, strict=True)]


def stack_of(model: IntervenedModel, positions: str) -> Stack:
    return Stack(model.base_model, [Member.of(model, groups(positions))])


def left_padded(model: IntervenedModel, examples: list[Example], positions: str) -> list[Tensor]:
    width = max(len(each.input_ids) for each in examples)
    ids = torch.tensor([[1] * (width - len(each.input_ids)) + each.input_ids for each in examples])
    mask = torch.tensor([[0] * (width - len(each.input_ids)) + [1] * len(each.input_ids) for each in examples])
    stack = stack_of(model, positions)
    edits = PassEdits(stack, requests_of(examples, member=1), width=width, device=model.device)
    places = {} if "opt" in type(model.base_model).__name__.lower() else {"position_ids": (mask.cumsum(1) - 1).clamp(0)}
    with torch.no_grad(), stack.hooked():
        stack.live = edits.live(0, len(examples), width)
        found = model.base_model(input_ids=ids, attention_mask=mask, **places).logits
    return [row[width - len(each.input_ids) :] for row, each in zip(found, examples, strict=True)]


# ---- 1


def recomputed(model: IntervenedModel, prompt: Example, answer: list[int], positions: str) -> Tensor:
    """Logits of the next token at every step of an answer, each from the whole sequence without a cache: [T, V]."""
    found = []
    for count in range(len(answer)):
        whole = Example(prompt.input_ids + answer[:count], len(prompt.input_ids), None, "", "", 1)
        found.append(logits(model, [whole], positions)[0][-1])
    return torch.stack(found)


@pytest.mark.parametrize("positions", ["f2+l2", "prompt", "all", "generated"])
@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, [9, 1, 1, 1, 1]),
        ({"use_cache": False}, [9, 10, 11, 12, 13]),
        ({"cache_implementation": "static"}, [9, 1, 1, 1, 1]),
        ({"prefill_chunk_size": 4}, [4, 4, 1, 1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_of_cached_decoding_are_those_of_recomputation(
    family: str, changes: dict[str, Any], passes: list[int], positions: str
):
    model, prompts = intervened(family, positions=positions), [example(9), example(5, seed=3)]
    if "prefill_chunk_size" in changes:
        prompts = prompts[:1]  # transformers chunks unpadded prompts only
    width = len(prompts[0].input_ids)
    ids = torch.tensor([[1] * (width - len(each.input_ids)) + each.input_ids for each in prompts])
    mask = torch.tensor([[0] * (width - len(each.input_ids)) + [1] * len(each.input_ids) for each in prompts])
    config = config_of(Decoding(max_new_tokens=5, min_new_tokens=5), model.base_model, byte_tokenizer())
    config.update(**changes, output_logits=True, return_dict_in_generate=True)
    seen: list[int] = []
    look = model.base_model.get_input_embeddings().register_forward_hook(
        lambda _, args, __: seen.append(args[0].shape[1])
    )
    edits = edits_while_generating(model.base_model, stack_of(model, positions), requests_of(prompts, member=1))
    with torch.inference_mode(), look, edits:
        output = model.base_model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    assert seen == passes
    if "cache_implementation" in changes:
        assert type(output.past_key_values).__name__ == "StaticCache"
    scores = torch.stack(output.logits, dim=1)  # [B, T, V]
    for row, prompt in enumerate(prompts):
        answer = output.sequences[row, width:].tolist()
        torch.testing.assert_close(scores[row], recomputed(model, prompt, answer, positions), **EQUAL)


# ---- 2


@pytest.mark.parametrize("positions", ["f2+l2", "prompt", "all"])
@pytest.mark.parametrize("family", DECODERS)
def test_padding_on_either_side_and_none_give_equal_logits(family: str, positions: str):
    model, examples = intervened(family, positions=positions), [example(n, seed=n, row=n) for n in (3, 9, 6)]
    singly = [logits(model, [each], positions)[0] for each in examples]
    torch.testing.assert_close(logits(model, examples, positions), singly, **EQUAL)
    torch.testing.assert_close(left_padded(model, examples, positions), singly, **EQUAL)


@pytest.mark.parametrize("family", ENCODERS)
def test_padding_does_not_change_what_an_encoder_says(family: str):
    model, examples = intervened(family), [example(n, seed=n, row=n) for n in (3, 9, 6)]
    singly = [logits(model, [each])[0] for each in examples]
    torch.testing.assert_close(logits(model, examples), singly, **EQUAL)


# ---- 3


@pytest.mark.parametrize("method", METHODS)
def test_all_is_every_position(method: str):
    model, examples = intervened(method=method, positions="all"), [example(4), example(7, row=2)]
    batch = build_batch(examples, groups=groups("all"), layout="padded", pad_token_id=1)
    assert batch.rows["all"].tolist() == [0, 1, 2, 3, *range(7, 14)]  # nothing of the padding
    explicit = {"all": torch.tensor([row * 7 + token for row, n in ((0, 4), (1, 7)) for token in range(n)])}
    with torch.no_grad(), model, model.editing(explicit):
        found = model.base_model(**batch.inputs).logits
    torch.testing.assert_close([found[0, :4], found[1]], logits(model, examples, "all"), **BITWISE)


def test_padding_is_not_edited():
    model, seen = intervened(positions="all", layers=[1]), []
    batch = build_batch([example(4), example(7, row=2)], groups=groups("all"), layout="padded", pad_token_id=1)
    with torch.no_grad(), model:
        with model.base_model.model.layers[1].register_forward_hook(lambda _, __, output: seen.append(output)):
            model.base_model(**batch.inputs)
            with model.editing(batch.rows):
                model.base_model(**batch.inputs)
    plain, edited = seen
    torch.testing.assert_close(edited[0, 4:], plain[0, 4:], **BITWISE)
    assert (edited[0, :4] != plain[0, :4]).any(-1).all()


@pytest.mark.parametrize("positions", ["f3", "f3+l2", "l2"])
def test_a_shared_prefix_does_not_see_what_follows(positions: str):
    """Two prompts of one template: up to the first token that differs, and is edited, all states are equal."""
    model = intervened(positions=positions)
    first, second = example(12), example(12)
    second.input_ids[8:] = [33, 34, 35, 36]
    ours, theirs = (logits(model, [each], positions)[0] for each in (first, second))
    torch.testing.assert_close(ours[:8], theirs[:8], **BITWISE)
    assert not torch.allclose(ours[8:], theirs[8:])
    if positions == "f3":  # then the prefix may be computed once, whatever the length of the rest
        longer = Example([*first.input_ids, *range(40, 60)], 32, None, "", "", 1)
        torch.testing.assert_close(logits(model, [longer], positions)[0][:12], ours, **EQUAL)


# ---- 5, 7, 8


@contextmanager
def saved(model: IntervenedModel, path: Path, *, family: str, method: str, component: str) -> Iterator[IntervenedModel]:
    """The model that a checkpoint of this one gives."""
    base = base_of(family)
    manifest = {
        "reft_version": "0",
        "step": 0,
        "base": describe_base(base),
        "intervention": InterventionIdentity(
            method=method,
            component=component,
            layers=[0, 1, 2],
            positions="f2+l2",
            tied=True,
            rank=model.bank.rank,
            width=model.bank.width,
        ),
        "text": TextIdentity(
            kind="causal_lm",
            metric="loss",
            format={},
            template={},
            labels=None,
            labels_given=False,
            append_eos=True,
            max_length=8,
            on_overflow="error",
        ),
        "generation": {},
    }
    write_checkpoint(path / "c", tensors=model.trainable_state(), manifest=manifest, training=({}, {}))
    yield build_from_checkpoint(base, read_checkpoint(path / "c"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_gives_the_same_logits_bit_for_bit(family: str, component: str, method: str, tmp_path: Path):
    model, examples = intervened(family, method=method, component=component), [example(7), example(4, row=2)]
    before = logits(model, examples)
    with saved(model, tmp_path, family=family, method=method, component=component) as loaded:
        torch.testing.assert_close(logits(loaded, examples), before, **BITWISE)
    assert not torch.allclose(before[0], plain_logits(family, examples[0]))


def plain_logits(family: str, one: Example) -> Tensor:
    with torch.no_grad():
        return base_of(family).model(input_ids=torch.tensor([one.input_ids])).logits[0]


@pytest.mark.parametrize("method", [name for name, bank in METHODS.items() if getattr(bank, "orthogonal", False)])
def test_rows_are_orthonormal_when_loaded_and_trained_on(method: str, tmp_path: Path):
    model = intervened(method=method)
    for _ in range(2):
        train(model, steps=20)
        with saved(model, tmp_path, family="llama", method=method, component="block_output") as model:
            rows = model.bank.rows().detach().double()
            error = (rows @ rows.mT - torch.eye(2, dtype=torch.float64)).abs().max()
            assert error < 1e-6


def train(model: IntervenedModel, *, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.bank.parameters(), lr=0.05, weight_decay=0.1)
    batch = build_batch([example(9, prompt=6)], groups=groups("f2+l2"), layout="padded", pad_token_id=1)
    model.train()
    for _ in range(steps):
        model.bank.refresh()
        with model, model.editing(batch.rows):
            model.logits_at(batch.inputs, batch.answer_rows).logsumexp(-1).sum().backward()
        model.bank.backpropagate()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def test_modes_reach_every_part_and_eval_mode_is_deterministic():
    model, examples = intervened(dropout=0.5), [example(7)]
    model.train()
    assert all(module.training for module in model.modules())
    model.bank.refresh()
    noisy = [logits(model, examples)[0] for _ in range(2)]
    model.eval()
    assert not any(module.training for module in model.modules())
    quiet = [logits(model, examples)[0] for _ in range(2)]
    assert not torch.equal(*noisy)
    torch.testing.assert_close(*quiet, **BITWISE)
    torch.testing.assert_close(quiet[0], logits(intervened(), examples)[0], **BITWISE)


# ---- 11


@pytest.mark.parametrize(
    ("row", "form", "template"),
    [
        ({"prompt": "one two", "completion": " three"}, "completion", None),
        ({"instruction": "count", "input": "one", "output": "two"}, "alpaca", None),
        ({"instruction": "count", "input": "", "output": "two"}, "alpaca", "alpaca"),
        (
            {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
            "messages",
            "chat",
        ),
        ({"text": "a film", "label": "good"}, "text", Inline("{text} =>", " {label}")),
    ],
)
def test_l1_is_the_last_token_of_the_prompt_in_every_format(row: dict[str, Any], form: str, template: Any):
    tokenizer, columns = byte_level(chat=True), list(row)
    shape = choose_format(columns, where="x:1", requested=form)
    chosen = choose_template(template, data_format=shape, task_kind="causal_lm", columns=columns, tokenizer=tokenizer)
    encoded = encode_examples(
        Rows("x", [row], [1], [1]),
        tokenizer=tokenizer,
        data_format=shape,
        template=chosen,
        task_kind="causal_lm",
        positions=Positions.parse("l1"),
        max_length=512,
    )
    (one,) = encoded.examples
    (group,) = groups("l1")
    (last,) = group.indices(one.prompt_length, len(one.input_ids))
    assert tokenizer.decode(one.input_ids[: last + 1]) == one.prompt
    assert tokenizer.decode(one.input_ids[last + 1 :]).startswith(one.completion)


# ---- 12


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_model_trains_as_many_numbers_as_the_formula_says(family: str, method: str, tied: bool):
    model = intervened(family, method=method, tied=tied)
    head = sum(parameter.numel() for parameter in model.head_parameters().values())
    assert (head > 0) == (family == "bert")
    sites, d, r = (3 if tied else 6), 32, model.bank.rank or 0
    expected = {"red": 2 * d, "consreft": d * r + r, "lobireft": d * r + r}.get(method, 2 * d * r + r)
    assert model.trainable_count() == sites * expected + head


# ---- 14


def gradients(rows: list[int], *, answer_rows: list[int]) -> dict[str, Tensor]:
    model = intervened(layers=[2]).train()
    model.bank.refresh()
    with model, model.editing({"f2+l2": torch.tensor(rows)}):
        model.logits_at({"input_ids": torch.tensor([example(9).input_ids])}, torch.tensor(answer_rows)).sum().backward()
    model.bank.backpropagate()
    model.eval()
    return {name: parameter.grad.clone() for name, parameter in model.bank.named_parameters()}


def test_in_the_last_layer_only_the_last_prompt_token_counts():
    """Six tokens of prompt, three of answer: of edits at 0, 1, 4 and 5 in the last layer, the loss sees that at 5."""
    together, alone = gradients([0, 1, 4, 5], answer_rows=[5, 6, 7]), gradients([5], answer_rows=[5, 6, 7])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)  # products of four rows and of one sum otherwise
    assert all(not each.any() for each in gradients([0, 1, 4], answer_rows=[5, 6, 7]).values())


def test_the_tests_named_above_exist():
    text = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py"))
    named = re.findall(r"\btest_\w+", __doc__ or "")
    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in text] == []
