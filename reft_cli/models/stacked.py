"""Folded interventions of several checkpoints on one base model, so that each row of a batch has one of them, or none.

Where checkpoints meet, their low-rank rows are laid end to end and a row of the batch sees its owner's only:
Δ = ((h downᵀ + bias) ⊙ [column's owner = row's owner]) up, plus scale ⊙ h + shift of the owner's diagonal. Ranks,
layers, components, positions and methods may differ; owner 0 is the base model, whose delta is zero. Shapes do not
depend on who owns the rows, so that a pass with edits can be captured as a CUDA graph.

Shapes: N edited rows, D width there, R ranks of all owners together, O owners with the base.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from reft_cli.interventions.folded import Folded, FoldedDiagonal, FoldedLowRank
from reft_cli.models.blocks import Blocks, Target, find_blocks, find_target, hook_target
from reft_cli.models.compiling import Options, compiled
from reft_cli.models.intervened import IntervenedModel
from reft_cli.models.sites import Site
from reft_cli.positions import PositionGroup

WHOLE = range(sys.maxsize)  # of a prompt's tokens: all that there are
BASE = 0  # the owner of rows that are not edited
Edit = Callable[..., Tensor]  # `edit_rows`, as it stands or compiled


@dataclass(frozen=True)
class Member:
    """One checkpoint: its sites, their folded interventions in that order, and which tokens its groups mean."""

    sites: tuple[Site, ...]
    folded: Folded
    groups: tuple[PositionGroup, ...]

    @classmethod
    def of(cls, model: IntervenedModel, groups: Sequence[PositionGroup]) -> Member:
        """A model's bank as it is now."""
        return cls(model.sites, model.bank.fold(), tuple(groups))


@dataclass(frozen=True)
class Live:
    """What a pass edits: flat rows of h.view(-1, D) (None: all of them) and the owner of each."""

    rows: Tensor | None  # [N]
    owners: Tensor  # [N]

    def to(self, device: torch.device) -> Live:
        """The same on a device; itself if it is there."""
        if self.owners.device == device:
            return self
        return Live(None if self.rows is None else self.rows.to(device), self.owners.to(device))


@dataclass(frozen=True)
class Place:
    """All owners' interventions at one end of one module."""

    down: Tensor  # [R, D]
    bias: Tensor  # [R]
    up: Tensor  # [R, D]
    column_owners: Tensor  # [R]
    diagonal: tuple[Tensor, Tensor] | None  # scale and shift [O, D]

    def to(self, device: torch.device) -> Place:
        """The same on a device."""
        down, bias, up, owners = (each.to(device) for each in (self.down, self.bias, self.up, self.column_owners))
        diagonal = self.diagonal and (self.diagonal[0].to(device), self.diagonal[1].to(device))
        return Place(down, bias, up, owners, diagonal)

    def edited(self, h: Tensor, live: Live, *, alone: bool, edit: Edit) -> Tensor:
        """h [..., D] with its live rows edited. `alone`: all of them belong to this place's one owner."""
        mine = None if alone and self.diagonal is None else live.owners
        return edit(h, live.rows, mine, self.down, self.bias, self.up, self.column_owners, self.diagonal)


def edit_rows(
    h: Tensor,  # [..., D]
    rows: Tensor | None,  # [N]
    owners: Tensor | None,  # [N], or None if all low-rank rows of the place are for every row
    down: Tensor,  # [R, D]
    bias: Tensor,  # [R]
    up: Tensor,  # [R, D]
    column_owners: Tensor,  # [R]
    diagonal: tuple[Tensor, Tensor] | None,  # two of [O, D]
) -> Tensor:
    """h + Δ at some flat rows, or at all: summed in float32 (float64 if either is), then rounded once."""
    flat = h.reshape(-1, h.shape[-1])
    before = flat if rows is None else flat.index_select(0, rows)  # [N, D]
    wide = before.to(torch.promote_types(h.dtype, down.dtype))
    after = wide
    if len(down):
        down, bias, up = (tensor.to(wide.dtype) for tensor in (down, bias, up))
        columns = functional.linear(wide, down, bias)  # [N, R]
        after = after + (columns if owners is None else columns * (owners[:, None] == column_owners)) @ up
    if diagonal is not None:
        assert owners is not None, "which diagonal is for a row, its owner says"
        scale, shift = diagonal
        after = after + torch.addcmul(shift[owners], wide, scale[owners])
    narrow = after.to(h.dtype)
    return (narrow if rows is None else flat.index_copy(0, rows, narrow)).view_as(h)


class Stack:
    """Members on a base model. `with stack.hooked(): ...` puts the hooks on, `stack.live` says what a pass edits."""

    def __init__(self, base_model: nn.Module, members: Sequence[Member], *, blocks: Blocks | None = None) -> None:
        self.base_model, self.members = base_model, tuple(members)
        self.live: Live | None = None
        self._edit: Edit = edit_rows
        self._owners = [
            {group.name: number for number, group in enumerate(member.groups, start=1 + before)}
            for member, before in zip(self.members, self._counts_before(), strict=True)
        ]
        blocks = blocks or (find_blocks(base_model) if members else None)
        self._places: list[tuple[Target, Place]] = []
        if blocks is not None:
            self._places = [(find_target(blocks, *at), self._place(at)) for at in self._locations()]

    def _counts_before(self) -> list[int]:
        counts = [len(member.groups) for member in self.members]
        return [sum(counts[:index]) for index in range(len(counts))]

    def _locations(self) -> list[tuple[int, str]]:
        """Every (layer, component) once, in the order in which members name them."""
        return list(dict.fromkeys((site.layer, site.component) for member in self.members for site in member.sites))

    def _place(self, at: tuple[int, str]) -> Place:
        found = [
            (self._owners[index][site.group], member.folded, row)
            for index, member in enumerate(self.members)
            for row, site in enumerate(member.sites)
            if (site.layer, site.component) == at
        ]
        like = found[0][1].tensors()[0]
        low = [(owner, folded, row) for owner, folded, row in found if isinstance(folded, FoldedLowRank)]
        columns = [torch.full((folded.down.shape[1],), owner, device=like.device) for owner, folded, _ in low]
        empty = like.new_zeros(0, like.shape[-1])
        return Place(
            down=torch.cat([empty, *(folded.down[row] for _, folded, row in low)]),
            bias=torch.cat([empty[:, 0], *(folded.bias[row] for _, folded, row in low)]),
            up=torch.cat([empty, *(folded.up[row] for _, folded, row in low)]),
            column_owners=torch.cat([torch.zeros(0, dtype=torch.long, device=like.device), *columns]),
            diagonal=self._diagonal(found, like),
        )

    def _diagonal(self, found: Sequence[tuple[int, Folded, int]], like: Tensor) -> tuple[Tensor, Tensor] | None:
        diagonal = [(owner, folded, row) for owner, folded, row in found if isinstance(folded, FoldedDiagonal)]
        if not diagonal:
            return None
        owners = 1 + sum(len(member.groups) for member in self.members)
        scale, shift = like.new_zeros(owners, like.shape[-1]), like.new_zeros(owners, like.shape[-1])
        for owner, folded, row in diagonal:
            scale[owner], shift[owner] = folded.scale[row], folded.bias[row]
        return scale, shift

    def prompt_rows(
        self, lengths: Sequence[int], members: Sequence[int], starts: Sequence[int], *, part: range = WHOLE
    ) -> Live | None:
        """What is edited of prompts of these lengths that begin at these flat rows, each for a member (0: none).

        Of each only the tokens in `part` are there.
        """
        rows, owners = self.edited_rows(lengths, members, starts, part=part)
        if not rows:
            return None
        device = self._places[0][1].down.device
        return Live(torch.tensor(rows, device=device), torch.tensor(owners, device=device))

    def edited_rows(
        self, lengths: Sequence[int], members: Sequence[int], starts: Sequence[int], *, part: range = WHOLE
    ) -> tuple[list[int], list[int]]:
        """The same as (flat rows, the owner of each)."""
        rows: list[int] = []
        owners: list[int] = []
        for length, member, start in zip(lengths, members, starts, strict=True):
            for group in self.groups_of(member):
                tokens = [token for token in group.indices(length, length) if token in part]
                rows += [start + token for token in tokens]
                owners += [self._owners[member - 1][group.name]] * len(tokens)
        return rows, owners

    def groups_of(self, member: int) -> tuple[PositionGroup, ...]:
        """Which tokens a member edits; the base model none."""
        return self.members[member - 1].groups if member else ()

    def owner_of_new_tokens(self, member: int) -> int:
        """Who edits the tokens that a member generates: one of its groups, or BASE."""
        names = [group.name for group in self.groups_of(member) if group.phase != "prompt"]
        return self._owners[member - 1][names[0]] if names else BASE

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside, passes of the base model are edited as `live` says."""
        with ExitStack() as hooks:
            for target, place in self._places:
                hooks.enter_context(hook_target(target, self._editor(place)))
            try:
                yield
            finally:
                self.live = None

    def fuse(self, *, options: Options | None = None) -> None:
        """Compile the arithmetic of the rows."""
        self._edit = compiled(edit_rows, options=options)

    def _editor(self, place: Place) -> Callable[[Tensor], Tensor | None]:
        one = sum(map(len, self._owners)) == 1  # then rows that are picked out are all its own
        here = place

        def edit(h: Tensor) -> Tensor | None:
            nonlocal here
            if self.live is None:
                return None
            if here.down.device != h.device:
                here = here.to(h.device)
            live = self.live.to(h.device)
            return here.edited(h, live, alone=one and live.rows is not None, edit=self._edit)

        return edit
