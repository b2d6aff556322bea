"""Log-probabilities of answers, token by token, a chunk of logits at a time.

Shapes: K answer rows, D hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from reft_cli.data.batch import Batch
from reft_cli.models.intervened import IntervenedModel
from reft_cli.tasks.cross_entropy import CHUNK


def log_probabilities(model: IntervenedModel, batch: Batch) -> Tensor:
    """log p(target | what stands before it) of every answer token, [K], float32.

    Only inside `model.editing`. Logits exist for one chunk at a time; the backward pass forms them again.
    """
    return torch.cat([chosen for chosen, _ in _chunks(model, batch, greedy=False)]).to(batch.targets.device)


@torch.no_grad()
def likelihoods(model: IntervenedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """(log-probabilities [K] float32, whether the target is the likeliest token [K]), without gradients."""
    chosen, likeliest = zip(*_chunks(model, batch, greedy=True), strict=True)
    return torch.cat(chosen).to(batch.targets.device), torch.cat(likeliest).to(batch.targets.device)


def _chunks(model: IntervenedModel, batch: Batch, *, greedy: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """(log-probabilities, hits) chunk by chunk; hits are empty unless `greedy`."""
    head = model.linear_head
    if head is None:
        yield _scored(model.logits_at(batch.inputs, batch.answer_rows), batch.targets, greedy)
        return
    h = model.answers_at(batch.inputs, batch.answer_rows)  # [K, D]
    targets = batch.targets.to(h.device)
    size = max(1, CHUNK // head.weight.shape[0])
    for rows, wanted in zip(h.split(size), targets.split(size), strict=True):
        if rows.requires_grad and len(targets) > size:
            given = (rows, head.weight, head.bias, wanted, greedy)
            yield checkpoint(_unembedded, *given, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn
        else:
            yield _unembedded(rows, head.weight, head.bias, wanted, greedy)


def _unembedded(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, greedy: bool
) -> tuple[Tensor, Tensor]:
    return _scored(linear(rows, weight, bias), targets, greedy)


def _scored(logits: Tensor, targets: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
    """Of logits [C, V]; the softmax is float32."""
    wide = logits.float()
    chosen = wide.gather(1, targets[:, None]).squeeze(1) - torch.logsumexp(wide, 1)
    return chosen, wide.argmax(1) == targets if greedy else targets.new_empty(0)
