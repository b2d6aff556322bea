"""How many tokens a model can take: those with learned positions have a hard end, others only grow worse."""

from __future__ import annotations

from torch import nn

NAMES = {"wpe", "embed_positions", "position_embeddings"}  # GPT-2 and kin; OPT; BERT and kin


def longest_sequence(model: nn.Module) -> int | None:
    """Tokens that the table of learned positions has room for; None if there is no such table.

    OPT keeps `offset` rows for itself, RoBERTa those up to the padding token's.
    """
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in NAMES and isinstance(module, nn.Embedding):
            spared = int(getattr(module, "offset", 0)) + (0 if module.padding_idx is None else module.padding_idx + 1)
            return module.num_embeddings - spared
    return None
