"""A frozen base model with a bank of interventions hooked to its sites.

Hooks are registered once and do nothing unless rows are given: `with model.editing(rows): ...`.
Rows are flat numbers into h.view(-1, D), one int64 tensor a position group, so that padded, packed, left-padded and
prefilling batches all look the same here. It knows no YAML and no tokenizer.

Shapes: B batch, T tokens, D hidden size, N edited rows, K answer rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from types import TracebackType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_cli.errors import ModelError
from reft_cli.interventions.bank import Bank
from reft_cli.models.attention import PACKED, attending
from reft_cli.models.blocks import Blocks, find_target, hidden_output, hidden_size, hook_target, norms_behind
from reft_cli.models.compiling import compilable_parts, compiling
from reft_cli.models.editing import RowEditor
from reft_cli.models.frozen import FrozenBlocks
from reft_cli.models.low_bit import true_count
from reft_cli.models.placement import devices_of, summary
from reft_cli.models.sharding import is_sharded
from reft_cli.models.sites import Site
from reft_cli.models.unembedding import linear_head
from reft_cli.positions import PositionGroup

Rows = Mapping[str, Tensor]


class IntervenedModel(nn.Module):
    """h' = h + Δ(h) at the rows of each site; everything else is the base model.

    `sites[i]` is edited by row i of the bank, at the tokens of its one of `groups`. The base is frozen; what trains is
    the bank and, for classification, the head: `head_parameters` are the base class's parameters outside its
    transformer.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        *,
        blocks: Blocks,
        bank: Bank,
        sites: tuple[Site, ...],
        groups: tuple[PositionGroup, ...],
    ) -> None:
        super().__init__()
        assert bank.sites == len(sites), "one row of the bank for each site"
        self.base_model = base_model
        self.bank = bank
        self.sites = sites
        self.groups = groups
        self.fused = False
        self._blocks = blocks
        self._edit = RowEditor(bank)
        self.frozen = FrozenBlocks(blocks, sites)
        self._rows: Rows | None = None
        self._answer_rows: Tensor | None = None
        self._read_rows: Tensor | None = None
        self._editing = False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._own_attention = base_model.config._attn_implementation
        self._targets = [find_target(blocks, site.layer, site.component) for site in sites]

    def __enter__(self) -> IntervenedModel:
        """Register the hooks, in the order of the sites."""
        assert not self._handles, "the hooks are registered already"
        for index, (site, target) in enumerate(zip(self.sites, self._targets, strict=True)):
            self._handles.append(hook_target(target, self._editor(index, site.group)))
        unembedding = self.base_model.get_output_embeddings()  # type: ignore[operator]
        if unembedding is not None:
            self._handles.append(unembedding.register_forward_pre_hook(self._keep_answer_rows))
        for module in filter(None, [self._last_mlp(), *norms_behind(self.base_model, self._blocks)]):
            self._handles += _only_at_rows(module, lambda: self._read_rows)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove our hooks and nobody else's."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _editor(self, index: int, group: str) -> Callable[[Tensor], Tensor | None]:
        def edit(h: Tensor) -> Tensor | None:
            rows = None if self._rows is None else self._rows.get(group)
            return None if rows is None else self._edit(h, rows, index)

        return edit

    @cached_property
    def linear_head(self) -> nn.Linear | None:
        """The unembedding, if logits are nothing but its output; then the loss needs no logits of its own."""
        if self.base_model.get_output_embeddings() is None:  # type: ignore[operator]
            return None
        with self.editing(None), self.packing(False):
            return linear_head(self.base_model)

    def _last_mlp(self) -> nn.Module | None:
        """The last block's MLP, if what it makes of a row depends on that row alone and nobody edits inside."""
        last = self.block_count - 1
        try:
            mlp = find_target(self._blocks, last, "mlp_output").module
        except ModelError:
            return None
        edited = {target.module for target in self._targets}
        return None if edited & set(mlp.modules()) else mlp

    def _keep_answer_rows(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._answer_rows is None:
            return None
        h = args[0]
        rows = self._answer_rows.to(h.device)
        return (h.reshape(1, -1, h.shape[-1]).index_select(1, rows), *args[1:])  # [1, K, D]

    @contextmanager
    def editing(self, rows: Rows | None) -> Iterator[None]:
        """Edit these rows in every forward pass inside; None: the base model.

        A backward pass that recomputes activations has to run inside too.
        """
        before, self._rows, self._editing = (self._rows, self._editing), rows, True
        try:
            yield
        finally:
            self._rows, self._editing = before
            self._read_rows = None

    def above(self, frozen: Tensor | None) -> AbstractContextManager[None]:
        """Inside, blocks that no edit reaches do not run: `frozen` comes out of them; None: they run."""
        return nullcontext() if frozen is None else self.frozen.replaced(frozen)

    def packing(self, wanted: bool) -> AbstractContextManager[None]:
        """Inside, attend within packed sequences, or in the model's own way."""
        return attending(self.base_model, PACKED if wanted else self._own_attention)

    def logits_at(self, inputs: Mapping[str, Tensor | int], answer_rows: Tensor) -> Tensor:
        """Logits [K, V] at flat rows only: those of a masked prompt are never formed."""
        self._answer_rows = answer_rows
        try:
            output = self.base_model(**inputs, use_cache=False)
        finally:
            self._answer_rows = None
        logits: Tensor = output.logits[0]
        return logits

    def answers_at(self, inputs: Mapping[str, Tensor | int], answer_rows: Tensor) -> Tensor:
        """What the unembedding is given at flat rows, [K, D], on its device; last MLP and norm run at these rows only.

        Only inside `editing`, which has to go on until the backward pass is done: it may compute the MLP again.
        """
        assert self._editing, "answers_at belongs into `with model.editing(rows)`"
        self._read_rows = answer_rows
        output = self.base_model.get_decoder()(**inputs, use_cache=False)
        if not torch.is_grad_enabled():
            self._read_rows = None
        h: Tensor = output.last_hidden_state
        some = h.reshape(-1, h.shape[-1]).index_select(0, answer_rows.to(h.device))
        head = self.linear_head
        return some if head is None else some.to(head.weight.device)

    @contextmanager
    def compiling(self, *, forgiving: bool = False) -> Iterator[None]:
        """Inside, blocks, edits and the loss run compiled; `forgiving` as in models/compiling.py."""
        assert self._handles, "hooks come first: parts are compiled around them"
        _ = self.linear_head  # found by trying the model, which is not to be compiled for that
        hooked = {target.module for target in self._targets} | set(filter(None, [self._last_mlp()]))
        parts = [part for block in self._blocks.modules for part in compilable_parts(block, hooked)]
        self._fuse(True)
        try:
            with compiling(parts, forgiving=forgiving):
                yield
        finally:
            self._fuse(False)

    def _fuse(self, wanted: bool) -> None:
        self.fused = wanted
        self._edit.fuse(wanted)

    def checkpoint_activations(self, wanted: bool) -> None:
        """Compute activations again in the backward pass, or keep them. Works for hooks inside blocks too."""
        base = self.base_model
        if hasattr(base, "activation_checkpointing_enable"):  # transformers 5.20 and later
            switch = base.activation_checkpointing_enable if wanted else base.activation_checkpointing_disable
        else:
            switch = base.gradient_checkpointing_enable if wanted else base.gradient_checkpointing_disable
        switch({"use_reentrant": False}) if wanted else switch()  # type: ignore[operator]
        base.disable_input_require_grads()  # type: ignore[operator]  # else all blocks below the edits go backward too

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters of the base class's task head, by their names in the base model."""
        return {name: p for name, p in self.base_model.named_parameters() if p.requires_grad}

    def trainable_state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds: the bank's tensors and the head's."""
        state = {f"bank.{name}": tensor for name, tensor in self.bank.state_dict().items()}
        return state | {f"head.{name}": p.detach() for name, p in self.head_parameters().items()}

    def trainable_count(self) -> int:
        """Numbers that are trained, bank and head."""
        return sum(tensor.numel() for tensor in self.trainable_state().values())

    def base_count(self) -> int:
        """Parameters of the base model."""
        return sum(true_count(p) for p in self.base_model.parameters())

    def blocks_above_edits(self) -> int:
        """Blocks from the lowest edited one up: those that have a backward pass."""
        return self.block_count - min(site.layer for site in self.sites)

    def operations_a_token(self) -> float:
        """Floating-point operations, forward and backward, without the embedding.

        2 a weight forward and 2 more backward (gradients of activations only; a full finetuning needs 4), the latter
        only in blocks from the lowest edited one up.
        """
        embedding = int(getattr(self.base_model.config, "vocab_size", 0)) * hidden_size(self.base_model)
        share = self.blocks_above_edits() / self.block_count
        return (2 + 2 * share) * max(self.base_count() - embedding, 0)

    @property
    def block_count(self) -> int:
        """Blocks of the base model."""
        return len(self._blocks.modules)

    @cached_property
    def is_sharded(self) -> bool:
        """Whether the base's blocks are spread over processes, which then have to run it in step."""
        return is_sharded(self.base_model)

    @property
    def device(self) -> torch.device:
        """Where the base model takes its input."""
        return self.devices[0]

    @cached_property
    def devices(self) -> list[torch.device]:
        """Every device that the base model runs on, that of its input first."""
        return devices_of(self.base_model)

    @cached_property
    def places(self) -> dict[str, int]:
        """How many blocks lie where, if they lie on several devices."""
        return summary(self.base_model, self._blocks.path, self.block_count)


def _only_at_rows(module: nn.Module, rows_of: Callable[[], Tensor | None]) -> list[torch.utils.hooks.RemovableHandle]:
    """Runs a module at some flat rows only, while there are any; elsewhere its output is zero, for nobody to read."""
    shape: list[torch.Size] = []  # of the input that was cut down

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        rows = rows_of()
        shape.clear()
        if rows is None or not args:
            return None
        h = args[0]
        shape.append(h.shape)
        some = h.reshape(*[1] * (h.ndim - 2), -1, h.shape[-1]).index_select(-2, rows.to(h.device))  # [1, K, D]
        return (some, *args[1:])

    def put_back(_: nn.Module, __: object, output: object) -> object:
        rows = rows_of()
        if rows is None or not shape:
            return None
        some = hidden_output(output)
        flat = some.new_zeros(shape[0][:-1].numel(), some.shape[-1])
        whole = flat.index_copy(0, rows.to(some.device), some.reshape(-1, some.shape[-1])).view(*shape[0][:-1], -1)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    return [module.register_forward_pre_hook(take), module.register_forward_hook(put_back)]
