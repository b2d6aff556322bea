"""Fills a packed batch up to a size that comes again, so that what is recorded for one batch runs for others.

The filling is a sequence of its own at the end, which nobody reads: edited rows beyond the real ones are its last
token, and answers beyond the real ones are not learned. Loss and gradients are those of the batch as it was; of pairs,
once pairs that were filled in have a reference that makes them certain (training/reference.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from reft_cli.data.batch import IGNORED, Batch
from reft_cli.models.attention import SHARED_HEAD

FINEST = 64  # tokens
SHARE = 16  # a size is rounded up by at most this part of it
NOWHERE = -1  # the place of what was filled in
LENGTHS = 128  # longest sequences are rounded to multiples of it; attention skips what is not there


def rounded(count: int, *, share: int = SHARE, finest: int = FINEST) -> int:
    """The next size up, of which there are few: multiples of the power of two below count / share."""
    step = max(finest, 1 << max(count.bit_length() - share.bit_length(), 0))
    return -(-count // step) * step


def fill(batch: Batch, *, pad_token_id: int) -> Batch:
    """A packed batch on the host with as many tokens, sequences, edited rows and answers as others will have."""
    ids, bounds = batch.inputs["input_ids"], batch.inputs["cu_seq_lens_q"]
    assert isinstance(ids, Tensor) and isinstance(bounds, Tensor), "a packed batch"
    real = ids.shape[1]
    size = rounded(real + 1)  # one token more at least: the row that fillings point to
    longest = rounded(int(batch.inputs["max_length_q"]), finest=LENGTHS)
    ends = [*range(real + longest, size, longest), size]
    sequences = rounded(len(bounds) - 1 + len(ends), share=4, finest=8)
    ends += [size] * (sequences + 1 - len(bounds) - len(ends))  # sequences of no token
    bounds = torch.cat([bounds, bounds.new_tensor(ends)])
    positions = batch.inputs["position_ids"]
    assert isinstance(positions, Tensor)
    inputs: dict[str, Tensor | int] = {
        "input_ids": _longer(ids, size, pad_token_id),
        "position_ids": torch.cat([positions, torch.arange(size - real)[None] % longest], dim=1),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if SHARED_HEAD in batch.inputs:
        inputs[SHARED_HEAD] = rounded(max(int(batch.inputs[SHARED_HEAD]), 1))
    answers = rounded(len(batch.targets), share=4)
    filled = replace(
        batch,
        inputs=inputs,
        rows={name: _longer(rows, rounded(len(rows)), size - 1) for name, rows in batch.rows.items()},
        answer_rows=_longer(batch.answer_rows, answers, size - 1),
        targets=_longer(batch.targets, answers, IGNORED),
        places=_longer(batch.places, size, NOWHERE),
    )
    return _fill_pairs(filled) if batch.pairs else filled


def _fill_pairs(batch: Batch) -> Batch:
    """A batch that is filled up otherwise with as many pairs as others will have; what is filled in is nobody's."""
    owners, beginnings = batch.owners, batch.beginnings
    assert owners is not None and beginnings is not None, "a batch of pairs"
    pairs = rounded(batch.pairs, share=4, finest=4)
    moved = owners + (owners >= batch.pairs) * (pairs - batch.pairs)  # rejected sequences come after more chosen ones
    return replace(
        batch,
        targets=batch.targets.clamp(min=0),  # any token: its log-probability is formed and given to nobody
        owners=_longer(moved, len(batch.targets), 2 * pairs),
        beginnings=_longer(beginnings, pairs, NOWHERE),
        pairs=pairs,
    )


def _longer(tensor: Tensor, size: int, value: int) -> Tensor:
    """The last dimension filled up to a size."""
    return torch.nn.functional.pad(tensor, (0, size - tensor.shape[-1]), value=value)
