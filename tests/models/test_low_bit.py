"""Bases in four and eight bits: near the whole model, of the same shape hash, trainable; what is said without them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from reft_cli import runs
from reft_cli.errors import SpecError
from reft_cli.models.loading import BaseSource, load_causal_lm, load_classifier
from reft_cli.models.low_bit import true_count
from reft_cli.spec.load import load_spec
from reft_cli.training.observer import NullObserver

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_is_missing_is_named(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SpecError) as caught:
        load_causal_lm(BaseSource(str(tiny_llama), device="cpu", quantization=kind))
    assert str(caught.value) == f"model.quantization: {kind} needs bitsandbytes: pip install 'reft[quant]'"


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "size", "near"), [("nf4", 0.5, 0.6), ("int8", 1.0, 0.2)])
def test_it_is_near_the_whole_model_and_small(kind: str, size: float, near: float):
    source = BaseSource("bundled:tiny-llama", device="cpu")
    whole, small = load_causal_lm(source), load_causal_lm(BaseSource(source.name, device="cpu", quantization=kind))
    assert small.shape_hash == whole.shape_hash
    weights = [module.mlp.down_proj.weight for module in (whole.model.model.layers[0], small.model.model.layers[0])]
    assert true_count(weights[1]) == weights[0].numel()
    assert weights[1].numel() * weights[1].element_size() == size * weights[0].numel()
    ids = torch.tensor([[40, 50, 60, 70, 80, 90]])
    first, second = (each.model(input_ids=ids).logits.float() for each in (whole, small))
    assert (first - second).std() < near * first.std()


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_8_bit_layers_keep_nothing_and_have_the_same_gradients(device: str):
    loaded = load_causal_lm(BaseSource("bundled:tiny-llama", device=device, quantization="int8"))
    layer = loaded.model.model.layers[0].mlp.down_proj
    frozen, plain = type(layer), type(layer).__bases__[0]
    assert frozen.__name__ == "FrozenLinear8bit" and plain.__name__ == "Linear8bitLt"
    x = torch.randn(2, 7, layer.in_features, device=device, dtype=loaded.model.dtype).requires_grad_()
    found = {}
    for kind in (frozen, plain):
        layer.__class__ = kind
        product = layer.train()(x)
        kept = [each for each in vars(product.grad_fn).values() if isinstance(each, torch.Tensor)]
        assert not product.grad_fn.saved_tensors
        (slope,) = torch.autograd.grad(product.square().sum(), x)
        found[kind] = (product.detach(), slope, len(kept))
    assert found[frozen][2] == 0
    torch.testing.assert_close(found[frozen][:2], found[plain][:2])


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_a_head_is_not_quantised(tiny_llama: Path):
    source = BaseSource(str(tiny_llama), device="cpu", quantization="nf4")
    loaded = load_classifier(source, outputs=3, pad_token_id=1, seed=0)
    assert loaded.model.score.weight.dtype == torch.float32 and loaded.model.score.weight.requires_grad


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_it_trains_reloads_and_is_not_another_base(tmp_path: Path, kind: str):
    config = Path(__file__).parents[2] / "configs/debug/tiny.yaml"
    spec = load_spec(config, overrides=["model.device=cpu", f"model.quantization={kind}"])
    done = runs.train(spec, output=tmp_path / "run", observer=NullObserver())
    assert done.step == 10
    with runs.open_run(done.run, place=runs.BasePlace(device="cpu")) as session:
        assert session.checkpoint.manifest.base.quantization == kind
        assert session.answer(["Good."], settings={"max_new_tokens": 2})
