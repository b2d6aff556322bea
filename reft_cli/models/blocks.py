"""Finds the blocks of a Hugging Face model and the modules inside them, without a card for each architecture.

The blocks are the model's one list of equal modules; what stands in them is known by a small table of names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reft_cli.errors import ModelError
from reft_cli.layers import COMPONENTS, parse_layers
from reft_cli.models.placement import entry_device

ENCODER_DECODER = (
    "encoder-decoder, which is not supported; "
    "decoders (Llama, Qwen, GPT-2, …) and encoders (BERT, RoBERTa, DeBERTa, …) are"
)
# component -> paths inside a block, most specific first; the first one that exists is taken
PATHS: dict[str, tuple[str, ...]] = {
    "attention_output": (
        "attention.output.dense",  # BERT, RoBERTa, DeBERTa: before dropout, residual and layer norm
        "self_attn",
        "attn",
        "attention",
        "self_attention",
        "linear_attn",
    ),
    "mlp_output": (
        "mlp",
        "block_sparse_moe",
        "feed_forward",
        "ffn",
        "fc2",  # OPT
        "output.dense",  # BERT and kin
    ),
    "mlp_activation": (
        "mlp.down_proj",
        "mlp.c_proj",
        "mlp.dense_4h_to_h",
        "mlp.fc2",
        "mlp.fc_out",
        "feed_forward.w2",
        "fc2",
        "output.dense",
    ),
}


@dataclass(frozen=True)
class Target:
    """The module a site hooks, and which end of it."""

    module: nn.Module
    end: Literal["input", "output"]
    path: str


@dataclass(frozen=True)
class Blocks:
    """The model's blocks in order, and where they stand."""

    path: str
    modules: tuple[nn.Module, ...]


def find_blocks(model: nn.Module) -> Blocks:
    """The one list of equal blocks.

    ModelError: the model is an encoder-decoder, or has no or several such lists.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} is an {ENCODER_DECODER}")
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside_another = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside_another and _are_blocks(module):
            lists[path] = module
    depth = getattr(_text_config(config), "num_hidden_layers", None)
    fitting = {path: found for path, found in lists.items() if depth in (None, len(found))}
    if len(fitting) != 1:
        seen = ", ".join(f"{path} ({len(found)})" for path, found in lists.items()) or "none"
        raise ModelError(
            f"{type(model).__name__}: expected one list of {depth or 'equal'} blocks, found {len(fitting)}; "
            f"lists of blocks in it: {seen}"
        )
    path, found = fitting.popitem()
    return Blocks(path, tuple(found))


def norms_behind(model: nn.Module, blocks: Blocks) -> list[nn.Module]:
    """Normalisations that stand behind the blocks; each works on one row at a time, as its class's name says."""
    parent, _, name = blocks.path.rpartition(".")
    children = list(model.get_submodule(parent).named_children())
    place = [child for child, _ in children].index(name)
    return [each for _, each in children[place + 1 :] if type(each).__name__.endswith(("RMSNorm", "LayerNorm"))]


def _are_blocks(modules: nn.ModuleList) -> bool:
    classes = {type(module) for module in modules}
    return len(classes) == 1 and any(True for module in modules for _ in module.parameters())


def _text_config(config: object) -> object:
    text = getattr(config, "get_text_config", None)
    return text() if callable(text) else config


def select_layers(blocks: Blocks, layers: str | list[int], *, model_name: str) -> tuple[int, ...]:
    """Layer numbers of a spec, checked against the model. ModelError: one does not exist."""
    count = len(blocks.modules)
    chosen = parse_layers(layers)
    if chosen is None:
        return tuple(range(count))
    if chosen[-1] >= count:
        raise ModelError(
            f"intervention.layers: layer {chosen[-1]} does not exist; {model_name} has layers 0-{count - 1}"
        )
    return chosen


def find_target(blocks: Blocks, layer: int, component: str) -> Target:
    """The module and end that a component means in one block. ModelError: there is none; lists what there is."""
    block = blocks.modules[layer]
    where = f"{blocks.path}.{layer}"
    if component in ("block_input", "block_output"):
        return Target(block, "input" if component == "block_input" else "output", where)
    if component in PATHS:
        end: Literal["input", "output"] = "input" if component == "mlp_activation" else "output"
        for path in PATHS[component]:
            module = _submodule(block, path)
            if module is not None:
                _check_adds(module, component, f"{where}.{path}", end)
                return Target(module, end, f"{where}.{path}")
    else:
        path, _, named_end = component.rpartition(".")
        module = _submodule(block, path) if path else None
        if module is not None and named_end in ("input", "output"):
            return Target(module, "input" if named_end == "input" else "output", f"{where}.{path}")
    modules = [name for name, _ in block.named_modules() if name and not name.split(".")[-1].isdigit()]
    raise ModelError(
        f"intervention.component: `{component}` is not in {where} ({type(block).__name__}); write one of "
        f"{', '.join(COMPONENTS)}, or a module with .input or .output; modules here: {', '.join(modules)}"
    )


def _check_adds(module: nn.Module, component: str, path: str, end: str) -> None:
    """ModelError: what comes out of a sub-layer is not what it adds to the stream, as in BLOOM, but the sum."""
    if end == "output" and "residual" in signature(module.forward).parameters:
        raise ModelError(
            f"intervention.component: {path} ({type(module).__name__}) gives back the residual stream with what it "
            f"adds to it, so there is no {component} to edit; write block_output"
        )


def _submodule(block: nn.Module, path: str) -> nn.Module | None:
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


def hidden_size(model: nn.Module) -> int:
    """Width of the residual stream."""
    return int(_text_config(model.config).hidden_size)  # type: ignore[attr-defined]


@torch.no_grad()
def target_width(model: nn.Module, target: Target, component: str) -> int:
    """Width of the hidden states at a target: known by name, by the linear layer, or by running two tokens."""
    if component in ("block_input", "block_output", "attention_output", "mlp_output"):
        return hidden_size(model)
    if isinstance(target.module, nn.Linear):
        return target.module.in_features if target.end == "input" else target.module.out_features
    seen: list[int] = []

    def remember(tensor: Tensor) -> None:
        seen.append(tensor.shape[-1])

    if target.end == "input":
        handle = target.module.register_forward_pre_hook(
            lambda _, args, kwargs: remember(hidden_input(args, kwargs)), with_kwargs=True
        )
    else:
        handle = target.module.register_forward_hook(lambda _, __, output: remember(hidden_output(output)))
    with handle:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=entry_device(model)))
    if not seen:
        raise ModelError(
            f"intervention.component: {target.path} does not run in a forward pass, so it cannot be edited"
        )
    return seen[0]


def hidden_input(args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
    """The hidden states among a module's arguments."""
    h = args[0] if args else kwargs.get("hidden_states")
    assert isinstance(h, Tensor), "the first argument of a hooked module is its hidden states"
    return h


def hidden_output(output: object) -> Tensor:
    """The hidden states in a module's output, which may be a tuple."""
    h = output[0] if isinstance(output, tuple) else output
    assert isinstance(h, Tensor), "the first output of a hooked module is its hidden states"
    return h


def hook_target(target: Target, edit: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """From now on the hidden states at a target are what `edit` makes of them; None leaves them as they are."""

    def at_output(_: nn.Module, __: object, output: object) -> object:
        edited = edit(hidden_output(output))
        if edited is None:
            return None
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def at_input(
        _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        edited = edit(hidden_input(args, kwargs))
        if edited is None:
            return None
        return ((edited, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": edited})

    if target.end == "output":
        return target.module.register_forward_hook(at_output)
    return target.module.register_forward_pre_hook(at_input, with_kwargs=True)
