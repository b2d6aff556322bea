"""Blocks and components are found in every family; what is missing is named."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, MptConfig, T5Config, T5ForConditionalGeneration

from reft_cli.errors import ModelError
from reft_cli.layers import COMPONENTS
from reft_cli.models.blocks import find_blocks, find_target, select_layers, target_width
from tiny_models import DECODERS, ENCODERS, base_of

FAMILIES = [*DECODERS, *ENCODERS]
MIXTURES = ("mixtral", "qwen3_moe")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("component", COMPONENTS)
def test_component_has_the_width_that_flows_there(family: str, component: str):
    model = base_of(family).model
    blocks = find_blocks(model)
    assert len(blocks.modules) == 3
    if component == "mlp_activation" and family in MIXTURES:
        with pytest.raises(ModelError, match=r"`mlp_activation` is not in model\.layers\.0 .*modules here: self_attn"):
            find_target(blocks, 0, component)
        return
    target = find_target(blocks, 2, component)
    seen: list[int] = []
    if target.end == "input":
        hook = target.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]) if args else None)
    else:
        hook = target.module.register_forward_hook(
            lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out).shape[-1])
        )
    with hook, torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert seen == [target_width(model, target, component)]


@pytest.mark.parametrize(
    ("component", "width"),
    [
        ("mlp.down_proj.input", 48),
        ("mlp.down_proj.output", 32),
        ("self_attn.k_proj.output", 16),
        ("mlp.act_fn.output", 48),
        ("self_attn.input", 32),
    ],
)
def test_any_module_path_is_a_component(component: str, width: int):
    model = base_of("llama").model
    assert target_width(model, find_target(find_blocks(model), 1, component), component) == width


def test_unknown_component_names_the_modules():
    blocks = find_blocks(base_of("llama").model)
    with pytest.raises(ModelError) as caught:
        find_target(blocks, 0, "mlp.down_prj.input")
    assert "intervention.component: `mlp.down_prj.input` is not in model.layers.0 (LlamaDecoderLayer)" in str(
        caught.value
    )
    assert "mlp.down_proj" in str(caught.value)


def test_layer_out_of_range():
    blocks = find_blocks(base_of("llama").model)
    assert select_layers(blocks, "all", model_name="x") == (0, 1, 2)
    assert select_layers(blocks, "0-2/2", model_name="x") == (0, 2)
    with pytest.raises(ModelError, match=r"^intervention.layers: layer 16 does not exist; tiny has layers 0-2$"):
        select_layers(blocks, [1, 16], model_name="tiny")


def test_encoder_decoder_is_refused_in_one_line():
    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match=r"is an encoder-decoder, which is not supported; decoders .* and encoders"):
        find_blocks(T5ForConditionalGeneration(config))


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_a_sub_layer_that_adds_the_stream_itself_is_no_component(family: str):
    """Its output was taken for what it adds; and narrowed to the answers' rows, it was added to all of them."""
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4} if family == "bloom" else {"d_model": 32, "n_layers": 2}
    config = {"bloom": BloomConfig, "mpt": MptConfig}[family](vocab_size=64, **sizes)
    blocks = find_blocks(AutoModelForCausalLM.from_config(config))
    with pytest.raises(
        ModelError, match=r"gives back the residual stream .* no mlp_output to edit; write block_output"
    ):
        find_target(blocks, 0, "mlp_output")
    assert find_target(blocks, 1, "block_output").module is blocks.modules[1]
