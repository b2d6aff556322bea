"""Linear layers that read the same rows as one product, for the compiled steps of decoding.

The query, key and value of a token are three small products whose weights a GPU reads at a fraction of its bandwidth;
laid end to end they are one, at twice the speed. Each layer then asks for the whole product and keeps its part; a
compiler that sees the same product asked for several times makes it once, which `SameOnce` sees to.

Shapes: O output width of all layers together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # children of a module that are given the same rows
NAMES_ONE_ROW = NAMES[:1]  # gate and up are reductions then, which a compiler fuses with their product
VERSION = 1  # of SameOnce, for the compiler's cache


class Part(nn.Linear):
    """A linear layer as some columns of a wider one: x ↦ (x Wᵀ + b)[start:stop], W [O, in] and b [O] of all."""

    whole: Tensor
    whole_bias: Tensor | None
    start: int
    stop: int

    def forward(self, input: Tensor) -> Tensor:
        """Of the whole product its part."""
        return linear(input, self.whole, self.whole_bias)[..., self.start : self.stop]


class SideBySide:
    """A model's neighbouring linear layers, laid end to end; each one's weight becomes a view of the whole.

    `hooked` are modules with hooks: a layer stays alone if it, or one beside it, is hooked, since then its parent is
    not compiled as a whole. `one_row`: products will have one row.
    """

    def __init__(self, model: nn.Module, *, hooked: Collection[nn.Module], one_row: bool = False) -> None:
        self._parts: list[tuple[nn.Linear, dict[str, Any]]] = []
        for parent in model.modules():
            if any(each in hooked for each in parent.modules() if each is not parent):
                continue
            for names in NAMES_ONE_ROW if one_row else NAMES:
                layers = [getattr(parent, name, None) for name in names]
                if _alike(layers):
                    self._lay(layers)  # type: ignore[arg-type]  # all are linear layers

    @torch.no_grad()
    def _lay(self, layers: list[nn.Linear]) -> None:
        whole = nn.Parameter(torch.cat([each.weight for each in layers]), requires_grad=False)  # [O, in]
        biases: list[Tensor] = [each.bias for each in layers if each.bias is not None]
        bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        start = 0
        for each in layers:
            stop = start + each.out_features
            each.weight.data = whole.data[start:stop]
            if bias is not None:
                each.bias.data = bias.data[start:stop]
            self._parts.append((each, {"whole": whole, "whole_bias": bias, "start": start, "stop": stop}))
            start = stop

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the layers compute their whole products."""
        for layer, facts in self._parts:
            layer.__dict__.update(facts)  # past nn.Module, for which the whole would be one more parameter
            layer.__class__ = Part
        try:
            yield
        finally:
            for layer, facts in self._parts:
                layer.__class__ = nn.Linear
                for name in facts:
                    del layer.__dict__[name]


def _alike(layers: list[Any]) -> bool:
    """Whether they are plain linear layers of one input width and type, all with a bias or none."""
    if any(type(each) is not nn.Linear or type(each.weight.data) is not Tensor for each in layers):
        return False
    facts = {(each.in_features, each.weight.dtype, each.weight.device, each.bias is None) for each in layers}
    return len(facts) == 1


def same_once() -> Any:  # noqa: ANN401  a class of torch's, imported where something is compiled
    """A pass over a traced graph, in which the same pure operation on the same values is computed once."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class SameOnce(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            merge_same(graph)

        def uuid(self) -> str:
            return f"reft_same_once_{VERSION}"

    return SameOnce()


def merge_same(graph: torch.fx.Graph) -> None:
    """Replace later calls of a pure operation by the first one with the same arguments."""
    first: dict[Any, torch.fx.Node] = {}
    for node in list(graph.nodes):
        if not _pure(node):
            continue
        key = repr((node.target, node.args, node.kwargs))  # nodes are printed by their names, which are unique
        if key in first:
            node.replace_all_uses_with(first[key])
            graph.erase_node(node)
        else:
            first[key] = node


def _pure(node: torch.fx.Node) -> bool:
    operation = node.target
    return (
        node.op == "call_function"
        and isinstance(operation, torch._ops.OpOverload)
        and operation.namespace in ("aten", "prims")
        and not operation._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in operation.tags
    )
