"""Packed attention is exact in the families that take it, and refused with its reason in those that do not."""

from __future__ import annotations

import pytest
import torch
import transformers

from reft_cli.models import attention
from reft_cli.models.attention import NotPackable, attending, packed_attention
from reft_cli.models.packing import packing_inputs, why_not_packed
from tiny_models import DECODERS, base_of, config_of


@pytest.mark.parametrize("family", DECODERS)
def test_packing_is_known_by_trying(family: str):
    reason = why_not_packed(base_of(family).model)
    assert reason == ("its attention uses softcap" if family == "gemma2" else None)


def test_a_mask_of_a_fixed_size_is_not_packed():
    """GPT-Neo's masks end at its longest sequence; a row that was longer ended training in an internal error."""
    config = transformers.GPTNeoConfig(
        vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=48,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    reason = "its attention has a mask of its own, of 48 tokens, and a packed row has more"
    assert why_not_packed(model) == reason


def test_rounding_is_not_taken_for_a_wrong_mask():
    model = transformers.AutoModelForCausalLM.from_config(config_of("llama")).eval().to(torch.bfloat16)
    assert why_not_packed(model.requires_grad_(False)) is None


def test_a_model_that_hides_the_bounds_is_not_packed(monkeypatch: pytest.MonkeyPatch):
    model = base_of("llama").model
    inner = model.model.forward
    bounds = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    monkeypatch.setattr(
        model.model, "forward", lambda **kwargs: inner(**{k: v for k, v in kwargs.items() if k not in bounds})
    )
    assert why_not_packed(model) == "it does not hand sequence boundaries to its attention"


def test_a_model_whose_positions_run_on_is_not_packed(monkeypatch: pytest.MonkeyPatch):
    model = base_of("gpt2").model
    inner = model.transformer.forward
    monkeypatch.setattr(
        model.transformer, "forward", lambda *args, **kwargs: inner(*args, **{**kwargs, "position_ids": None})
    )
    assert why_not_packed(model) == "its logits change when sequences are packed"


def test_a_wrong_backward_pass_is_found(monkeypatch: pytest.MonkeyPatch):
    model = base_of("llama").model
    inner = attention._by_length

    def steep(*tensors: object) -> torch.Tensor:
        attended = inner(*tensors)
        return attended + 99 * (attended - attended.detach())  # the same numbers, a hundred times the gradient

    monkeypatch.setattr(attention, "_by_length", steep)
    assert why_not_packed(model) == "its gradients change when sequences are packed"


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_packed_attention_is_softmax_within_each_sequence(window: int | None, heads: tuple[int, int]):
    torch.manual_seed(0)
    lengths = [5, 5, 1, 3]
    query, key, value = (torch.randn(1, count, sum(lengths), 8) for count in (heads[0], heads[1], heads[1]))
    bounds = packing_inputs(lengths)
    attended, _ = packed_attention(
        torch.nn.Module(), query, key, value, None, scaling=0.3, sliding_window=window,
        cu_seq_lens_q=bounds["cu_seq_lens_q"], max_length_q=5,
    )  # fmt: skip
    start = 0
    for length in lengths:
        span = slice(start, start + length)
        q, k, v = (t[0, :, span] for t in (query, key, value))
        k, v = (t.repeat_interleave(heads[0] // heads[1], dim=0) for t in (k, v))
        scores = 0.3 * q @ k.transpose(1, 2)
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        hidden = (distance < 0) | (distance >= (window or length))
        expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        torch.testing.assert_close(attended[0, span], expected.transpose(0, 1))
        start += length


def test_what_packed_attention_cannot_do_is_said():
    tensors = [torch.randn(1, 2, 3, 4) for _ in range(3)]
    bounds = {"cu_seq_lens_q": torch.tensor([0, 3], dtype=torch.int32), "max_length_q": 3}
    for extra, word in (
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.ones(2)}, "s_aux"),
        ({"dropout": 0.1}, "drop"),
    ):
        with pytest.raises(NotPackable, match=word):
            packed_attention(torch.nn.Module(), *tensors, None, **bounds, **extra)


def test_the_models_own_attention_comes_back():
    model = base_of("llama").model
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), attending(model):
        assert model.config._attn_implementation == "reft_packed"
        raise ZeroDivisionError
    assert model.config._attn_implementation == before
