"""Memory of a training pass, predicted from a pass over one row: what autograd keeps is counted, and grows with tokens.

    peak = weights + trained + kept a token × tokens + max(a block's backward pass, the head and a chunk's logits)

A frozen linear layer keeps nothing of its input. In a Llama block of width d, H and G numbers of queries and of keys,
and an MLP of m, a token keeps b = 8 d bytes (two norms in float32) and s (2 H + 2 G + 3 m) at s bytes a number
(queries, keys, values, attended; gate, its SiLU, up); the last block's MLP runs at answers only. Attention that forms
no scores is linear in the tokens. The last block's backward pass begins with everything still kept, and holds five
float32 copies of the hidden states in a norm, and their gradient. Under checkpointing a block is computed again, b, and
the gradients of its MLP are held beside it, 3 m s. Operations written in Python may hold on to tensors without telling
autograd: neither compiling nor checkpointing frees those. What compiling saves, and what recording costs, was measured
on one H200 (scripts/bench/memory.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.distributed.tensor import DTensor

from reft_cli.data.batch import Batch, Layout, build_batch
from reft_cli.data.examples import Example, Examples
from reft_cli.models.blocks import hidden_size
from reft_cli.models.intervened import IntervenedModel
from reft_cli.parallel.collective import smallest
from reft_cli.positions import PositionGroup
from reft_cli.tasks.cross_entropy import CHUNK
from reft_cli.tasks.objectives import Task

NORM = 22  # bytes a number of a hidden state: what a norm's backward pass holds, in float32, and the gradient
MLP = 0.63  # of what a block keeps is its MLP's, whose gradients are as large; 0.62 and 0.64 in Llama's shapes
HEAD = 6  # bytes a number of a hidden state: answers before the logits, and their gradient
COMPILED = 0.67  # of what is kept is kept by compiled blocks
RECORDED = 1.4  # graphs of several sizes beside each other hold more than one pass (one measurement, Llama-3.2-1B)
ROOM = 0.85  # of the free memory that a first guess fills; the allocator loses some
ADAM = 4  # tensors for each trained one: itself, its gradient, two moments


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of a pass of so many tokens and answers."""

    weights: int
    trained: int
    kept_a_token: float
    backward_a_token: float
    head_a_token: float
    logits_an_answer: float
    most_logits: float

    def working(self, tokens: int, answers: int) -> int:
        """What a pass needs besides weights and what is trained."""
        logits = min(self.logits_an_answer * answers, self.most_logits)
        return round(
            self.kept_a_token * tokens + max(self.backward_a_token * tokens, self.head_a_token * tokens + logits)
        )

    def peak(self, tokens: int, answers: int) -> int:
        """The most that is in use at once."""
        return self.weights + self.trained + self.working(tokens, answers)

    def tokens_in(self, free: int) -> int:
        """Tokens of a pass that free memory holds, by a guess on the safe side; every tenth of them an answer."""
        left = ROOM * free - self.trained - self.most_logits
        return max(int(left / (self.kept_a_token + max(self.backward_a_token, self.head_a_token))), 1)


def memory_parts(
    model: IntervenedModel, task: Task, batch: Batch, *, packed: bool, checkpointing: bool, compiled: bool = False
) -> MemoryParts:
    """Counts a pass over a small batch, with the hooks off and the base where it is; no weight is changed."""
    tokens, width = _tokens(batch), hidden_size(model.base_model)
    saved, hidden = _kept(model, task, batch, packed=packed, checkpointing=False)
    kept = ((COMPILED if compiled else 1) * saved + hidden) / tokens
    blocks = model.block_count - len(model.frozen.modules)  # those that have a backward pass
    block = kept / max(blocks - MLP, 1 - MLP)  # the last one keeps nothing of its MLP
    held = sum(_kept(model, task, batch, packed=packed, checkpointing=True)) / tokens if checkpointing else kept
    size = next(model.base_model.parameters()).element_size()
    vocabulary = int(getattr(model.base_model.config, "vocab_size", 0))
    # Logits and their float32 copy, which becomes the softmax, and its logarithm's sum; compiled, they are one.
    an_answer = vocabulary * (size + torch.float32.itemsize * (1 if compiled else 2))
    model.train()  # with what of the base is kept for training only
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in _parts_of(model.base_model)}
    model.eval()
    return MemoryParts(
        weights=sum(weights.values()),
        trained=ADAM * torch.float32.itemsize * model.trainable_count(),
        kept_a_token=held,
        backward_a_token=(1 + MLP) * block if checkpointing else NORM * width,
        head_a_token=HEAD * width,
        logits_an_answer=an_answer,
        most_logits=min(CHUNK, vocabulary * 2**20) / max(vocabulary, 1) * an_answer,
    )


def memory_parts_of(
    model: IntervenedModel,
    task: Task,
    *,
    examples: Sequence[Example],
    groups: Sequence[PositionGroup],
    layout: Layout,
    checkpointing: bool,
    compiled: bool,
) -> MemoryParts:
    """The same from the shortest of some examples."""
    shortest = Examples.of(examples).longest_first()[-1:]
    batch = build_batch(shortest, groups=groups, layout=layout, pad_token_id=0)
    return memory_parts(model, task, batch, packed=layout == "packed", checkpointing=checkpointing, compiled=compiled)


def first_budget(limit: int, parts: MemoryParts, devices: Sequence[torch.device], *, recorded: bool) -> int:
    """Tokens of a pass to try first: `limit`, or what the free memory of the fullest GPU of any process may hold.

    Passes that will be `recorded` leave room for that.
    """
    if devices[0].type != "cuda":
        return limit
    torch.cuda.empty_cache()
    free = min(torch.cuda.mem_get_info(each)[0] for each in devices)
    return smallest(min(limit, parts.tokens_in(int(free / (RECORDED if recorded else 1)))))


def _parts_of(module: nn.Module) -> Iterator[Tensor]:
    """What a module holds on its device: parameters and buffers, of a sharded one the part that is here."""
    for tensor in chain(module.parameters(), module.buffers()):
        if not tensor.is_meta:  # fetched for each pass
            yield tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _tokens(batch: Batch) -> int:
    ids = batch.inputs["input_ids"]
    assert isinstance(ids, Tensor)
    return ids.numel()


def _kept(model: IntervenedModel, task: Task, batch: Batch, *, packed: bool, checkpointing: bool) -> tuple[int, int]:
    """Bytes that autograd keeps of a pass, and what operations hold on to besides: every piece of memory once, and no
    weight, be it gathered or fetched."""
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage, whole = tensor.untyped_storage(), tensor if tensor._base is None else tensor._base
        if storage.data_ptr() not in weights and not isinstance(whole, nn.Parameter):
            found[storage._cdata] = storage.nbytes()
        # Kept, for a storage's address to stay its own; not the tensor itself, for an operator that keeps its output
        # would be kept by what it keeps, with the whole graph and the weights.
        return tensor.detach()

    there = batch.to(model.device)
    inputs = [*there.inputs.values(), *there.rows.values(), there.answer_rows, there.targets]
    model.checkpoint_activations(checkpointing)
    model.train()
    weights = {part.untyped_storage().data_ptr() for part in _parts_of(model)}
    weights |= {each.untyped_storage().data_ptr() for each in inputs if isinstance(each, Tensor)}
    with model, model.packing(packed):
        model.bank.refresh()
        values = [value for site in range(model.bank.sites) for value in model.bank.values(site)]
        weights |= {value.untyped_storage().data_ptr() for value in values}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), model.editing(there.rows):
            loss = task.loss(model, there)
        saved = sum(found.values())
        for tensor in _held(loss):
            note(tensor)
    model.bank.zero_grad()
    model.checkpoint_activations(False)
    model.eval()
    return saved, sum(found.values()) - saved


def _held(loss: Tensor) -> Iterator[Tensor]:
    """Tensors that operations of a graph have as attributes of their own; only those written in Python can."""
    waiting, seen = [loss.grad_fn], {loss.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        attributes: Iterable[object] = vars(node).values() if isinstance(node, BackwardCFunction) else ()
        groups = (each if isinstance(each, tuple | list) else (each,) for each in attributes)
        yield from (each for each in chain.from_iterable(groups) if isinstance(each, Tensor))
        new = {each for each, _ in node.next_functions} - seen
        seen |= new
        waiting += new
