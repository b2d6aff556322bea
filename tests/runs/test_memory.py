"""Predicted memory: what autograd keeps of a block follows from its shape, and a GPU's peak is near it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from reft_cli.data.batch import Batch, Layout, build_batch
from reft_cli.data.examples import Example
from reft_cli.models.build import build_intervened
from reft_cli.models.float8 import to_float8
from reft_cli.models.intervened import IntervenedModel
from reft_cli.models.loading import BaseModel, shape_hash
from reft_cli.positions import Positions
from reft_cli.runs.estimate import Estimate, estimate
from reft_cli.runs.memory import MemoryParts, memory_parts
from reft_cli.tasks.objectives import TASKS

POSITIONS = Positions.parse("f7+l7")
TASK = TASKS["causal_lm"]


def llama(
    dtype: torch.dtype, *, width: int, mlp: int, blocks: int, device: str = "cpu", heads: int = 4, vocabulary: int = 300
) -> IntervenedModel:
    """A random Llama with half as many heads for keys as for queries, edited after every block."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=heads // 2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).requires_grad_(False).eval().to(device)
    return build_intervened(
        BaseModel(model, "random", None, shape_hash(model)),
        method="loreft", layers="all", component="block_output", positions=POSITIONS, tied=True, rank=4, init="paper",
        dropout=0.0, dropout_on="delta", seed=0,
    )  # fmt: skip


def rows(count: int, tokens: int) -> list[Example]:
    return [Example([5] * tokens, tokens - 5, None, "", "", row) for row in range(1, count + 1)]


def batch(tokens: int, layout: Layout = "packed") -> Batch:
    return build_batch(rows(1, tokens), groups=POSITIONS.groups(tied=True), layout=layout, pad_token_id=0)


def estimate_of(
    model: IntervenedModel, *, count: int = 32, tokens: int = 256, checkpointing: bool = False, recorded: bool = False
) -> Estimate:
    return estimate(
        model, TASK, examples=rows(count, tokens), groups=POSITIONS.groups(tied=True), layout="packed", pad_token_id=0,
        steps=1, global_batch_size=count, micro_batch_size=None, token_budget=8192, checkpointing=checkpointing,
        compiled=False, recorded=recorded, shared=False,
    )  # fmt: skip


def parts_of(
    model: IntervenedModel,
    tokens: int,
    layout: Layout = "packed",
    *,
    checkpointing: bool = False,
    compiled: bool = False,
) -> MemoryParts:
    given, packed = batch(tokens, layout), layout == "packed"
    return memory_parts(model, TASK, given, packed=packed, checkpointing=checkpointing, compiled=compiled)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_follows_from_the_shape(dtype: torch.dtype, layout: Layout):
    d, m, blocks, size = 64, 160, 6, dtype.itemsize
    model = llama(dtype, width=d, mlp=m, blocks=blocks)
    found = parts_of(model, 400, layout).kept_a_token
    block = 8 * d + size * (2 * d + 2 * (d // 2) + 3 * m)
    # the first block has no backward pass; the last one's MLP runs at answers only
    wanted = (blocks - 1) * block - size * 3 * m + 4 * d  # and the last norm
    assert found == pytest.approx(wanted, rel=0.05)
    assert parts_of(model, 200, layout).kept_a_token == pytest.approx(found, rel=0.02)  # linear in the tokens


def test_checkpointing_keeps_little(tmp_path):
    model = llama(torch.float32, width=64, mlp=160, blocks=6)
    plain, frugal = (parts_of(model, 200, "packed", checkpointing=each) for each in (False, True))
    assert frugal.kept_a_token < 0.25 * plain.kept_a_token
    block, mlp = 8 * 64 + 4 * (2 * 64 + 2 * 32 + 3 * 160), 4 * 3 * 160
    assert frugal.backward_a_token == pytest.approx(block + mlp, rel=0.1)  # computed again, and gradients
    small = memory_parts(model, TASK, batch(200), packed=True, checkpointing=False, compiled=True)
    assert small.kept_a_token == pytest.approx(0.67 * plain.kept_a_token)
    assert all(parameter.grad is None for parameter in model.bank.parameters())


def test_the_parts_add_up():
    parts = MemoryParts(1000, 16, 10.0, 2.0, 0.0, 50.0, 120.0)
    assert parts.peak(100, 1) == 1000 + 16 + 1000 + 200  # a block is more than the logits
    assert parts.peak(10, 2) == 1000 + 16 + 100 + 100
    assert parts.peak(10, 9) == 1000 + 16 + 100 + 120  # no more logits at once than a chunk of them
    tokens = parts.tokens_in(100_000)
    assert tokens == int((0.85 * 100_000 - 16 - 120) / 12)


class Live(TorchDispatchMode):
    """The most memory that tensors made inside take at once."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.now, self.peak = known, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(made)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("width", "mlp", "blocks"), [(128, 512, 8), (256, 768, 6)])
def test_a_pass_takes_what_was_predicted(width: int, mlp: int, blocks: int, checkpointing: bool):
    model = llama(torch.bfloat16, width=width, mlp=mlp, blocks=blocks)
    parts = parts_of(model, 64, "packed", checkpointing=checkpointing)
    given = build_batch(rows(8, 64), groups=POSITIONS.groups(tied=True), layout="packed", pad_token_id=0)
    model.checkpoint_activations(checkpointing)
    with model.train(), model.packing(True):
        model.bank.refresh()
        with Live({p.untyped_storage()._cdata for p in model.parameters()}) as live, model.editing(given.rows):
            TASK.loss(model, given).backward()
    assert parts.working(8 * 64, len(given.targets)) == pytest.approx(live.peak, rel=0.15)


def test_logits_take_what_was_predicted():
    model = llama(torch.bfloat16, width=64, mlp=96, blocks=2, vocabulary=60_000)
    parts = parts_of(model, 64, "packed")
    given = build_batch(rows(8, 64), groups=POSITIONS.groups(tied=True), layout="packed", pad_token_id=0)
    _ = model.linear_head
    with model.train(), model.packing(True):
        model.bank.refresh()
        with Live({p.untyped_storage()._cdata for p in model.parameters()}) as live, model.editing(given.rows):
            TASK.loss(model, given).backward()
    assert parts.working(8 * 64, len(given.targets)) == pytest.approx(live.peak, rel=0.15)


def test_a_float8_base_is_counted_with_its_turned_weights():
    model = llama(torch.bfloat16, width=64, mlp=160, blocks=6)
    wide = parts_of(model, 50, "packed")
    to_float8(model.base_model)
    small = parts_of(model, 50, "packed")
    assert wide.weights == pytest.approx(small.weights, rel=0.05)  # one byte a weight, twice, and a scale a row
    assert small.kept_a_token < 1.6 * wide.kept_a_token  # float8 copies of what is multiplied, and no weights


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("width", "mlp", "blocks"), [(1024, 4096, 8), (2048, 8192, 4)])
def test_a_gpu_needs_what_was_predicted(width: int, mlp: int, blocks: int, checkpointing: bool):
    model = llama(torch.bfloat16, width=width, mlp=mlp, blocks=blocks, device="cuda", heads=width // 64)

    gc.collect()
    others = torch.cuda.memory_allocated() - sum(each.nbytes for each in model.parameters())  # of earlier tests
    found = estimate_of(model, checkpointing=checkpointing)
    assert found.measured_bytes is not None
    assert found.predicted_bytes == pytest.approx(found.measured_bytes - others, rel=0.15)


def test_recorded_passes_are_counted_with_what_graphs_hold_beside():
    model = llama(torch.bfloat16, width=64, mlp=160, blocks=3)
    plain, recorded = (estimate_of(model, count=4, tokens=32, recorded=each) for each in (False, True))
    assert recorded.activation_bytes == pytest.approx(1.4 * plain.activation_bytes)
    assert recorded.weights_bytes == plain.weights_bytes


class Squared(torch.autograd.Function):
    """An operation that keeps its own output, as attention does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        squared = x * x
        ctx.save_for_backward(x, squared)
        return squared

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        return 2 * upstream * ctx.saved_tensors[0]


class Holding(torch.autograd.Function):
    """An operation that holds on to its input by itself, as bitsandbytes' 8-bit layers do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.tensors, ctx.others = (None, x + 1), (None, 3)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        return upstream


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_operations_hold_on_to_is_counted_and_never_freed(checkpointing: bool):
    """In every block; neither checkpointing nor compiling saves anything of it."""
    model = llama(torch.bfloat16, width=64, mlp=160, blocks=3)
    ways = (False, True)  # compiled
    before = [parts_of(model, 200, checkpointing=checkpointing, compiled=each).kept_a_token for each in ways]
    handles = [
        block.mlp.down_proj.register_forward_pre_hook(lambda _, given: Holding.apply(*given))
        for block in model.base_model.model.layers
    ]
    after = [parts_of(model, 200, checkpointing=checkpointing, compiled=each).kept_a_token for each in ways]
    for handle in handles:
        handle.remove()
    # the first block has no backward pass, and the last one's MLP runs at answers only
    assert [new - old for new, old in zip(after, before, strict=True)] == pytest.approx([2 * 160, 2 * 160], rel=0.04)


def test_counting_leaves_nothing_behind():
    """What is kept of a pass must not keep the pass: its memory was held until the program ended."""
    model = llama(torch.bfloat16, width=64, mlp=160, blocks=3)
    inner = model.base_model.model.layers[1].mlp
    handle = inner.register_forward_hook(lambda _, __, output: Squared.apply(output))
    parts_of(model, 20, "packed")
    handle.remove()
    weight = weakref.ref(inner.down_proj.weight)
    del model, inner
    gc.collect()
    assert weight() is None
