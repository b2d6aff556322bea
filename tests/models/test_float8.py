"""Float8 layers multiply, forward and backward, to the three bits that float8 has."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from reft_cli.errors import ModelError
from reft_cli.models.float8 import Float8Linear, quantize_rows, to_float8, why_no_float8
from reft_cli.models.loading import BaseSource, load_causal_lm, shape_hash
from tiny_models import config_of

N, I, O = 24, 64, 48  # noqa: E741


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_products_and_gradients_are_close(dtype: torch.dtype, biased: bool, device: str):
    torch.manual_seed(0)
    linear = nn.Linear(I, O, bias=biased).requires_grad_(False)
    linear.weight *= torch.logspace(-3, 1, O)[:, None]  # rows of very different size
    linear = linear.to(device)
    small = Float8Linear(copy.deepcopy(linear).to(dtype)).train()
    x, upstream = torch.randn(2, N, I, device=device), torch.randn(2, N, O, device=device)
    found = []
    for layer, kind in ((linear.float(), torch.float32), (small, dtype)):
        given = x.to(kind).clone().requires_grad_(True)
        made = layer(given)
        made.backward(upstream.to(kind))
        found.append((made.detach().float(), given.grad.float()))
    assert small.weight.element_size() == 1 and made.dtype == dtype
    assert error(found[1][0], found[0][0]) < 0.05 and error(found[1][1], found[0][1]) < 0.06


def test_training_keeps_a_turned_copy_that_changes_nothing():
    small, found = Float8Linear(nn.Linear(I, O).requires_grad_(False)), []
    for mode in (False, True):
        x = torch.linspace(-1, 1, N * I).view(N, I).requires_grad_(True)
        small.train(mode)(x).sum().backward()
        assert (small.turned is not None) == mode
        found.append(x.grad)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_rows_keep_their_size_and_zeros():
    wide = torch.tensor([[1e-6, 2e-6], [0.0, 0.0], [3e4, -1e4]])
    small, scale = quantize_rows(wide)
    torch.testing.assert_close(small.float() * scale, wide, rtol=0.07, atol=0)


def test_the_blocks_alone_are_turned_and_the_shape_is_known_again():
    model = transformers.AutoModelForCausalLM.from_config(config_of("llama"))
    plain = copy.deepcopy(model)
    before = shape_hash(model)
    assert to_float8(model) == 3 * 7
    assert isinstance(model.model.layers[0].mlp.down_proj, Float8Linear) and type(model.lm_head) is nn.Linear
    assert shape_hash(model) == before
    with torch.no_grad():
        small, wide = (each(torch.tensor([[5, 6, 7, 8]])).logits for each in (model, plain))
    assert error(small, wide) < 0.1
    assert "float8" in repr(model.model.layers[0].mlp.down_proj)


def test_a_model_without_linear_layers_is_refused():
    model = transformers.AutoModelForCausalLM.from_config(config_of("gpt2"))  # its layers are Conv1D
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no linear layers in its blocks that float8 takes"):
        to_float8(model)


def test_devices_without_float8_are_named(monkeypatch: pytest.MonkeyPatch):
    assert why_no_float8(torch.device("cpu")) is None
    assert why_no_float8(torch.device("mps")) == "there is no float8 on mps"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    assert why_no_float8(torch.device("cuda")).startswith("NVIDIA A100 has no float8")


def test_a_compiler_takes_float8_layers(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    small = Float8Linear(nn.Linear(I, O).requires_grad_(False))
    run = torch.compile(lambda x: small(x * 2).relu(), backend="aot_eager", dynamic=True)
    found = []
    for forward in (run, lambda x: small(x * 2).relu()):
        torch.manual_seed(1)
        x = torch.randn(N, I, requires_grad=True)
        made = forward(x)
        made.square().sum().backward()
        found.append((made.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.gpu
def test_a_gpu_never_holds_the_wide_model(tmp_path: Path):
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    base = load_causal_lm(BaseSource(str(tmp_path), device="cuda", quantization="float8"))
    assert torch.cuda.max_memory_allocated() - before < 0.75 * size  # half of it, and a layer in float32
    assert {parameter.device.type for parameter in base.model.parameters()} == {"cuda"}
