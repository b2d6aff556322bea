"""Prompts, intervened models and their answers by full recomputation: what decoding is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from reft_cli.data.encode import Example
from reft_cli.generation.decode import Decoder, requests_of
from reft_cli.generation.settings import Decoding, Request
from reft_cli.generation.whole import generate
from reft_cli.models.build import build_intervened
from reft_cli.models.intervened import IntervenedModel
from reft_cli.models.loading import BaseModel
from reft_cli.positions import Positions
from tiny_models import base_of, byte_tokenizer

TOKENIZER = byte_tokenizer()
GREEDY = Decoding(max_new_tokens=8)
POSITIONS = ("f3+l3", "l1", "prompt", "generated", "all")


def prompt(length: int, *, seed: int = 0) -> Example:
    ids = [(11 * token + 5 * length + seed) % 290 + 2 for token in range(length)]
    return Example(ids, length, None, "", "", 1)


PROMPTS = [prompt(length) for length in (1, 2, 3, 7, 12)]
TEMPLATE = [(17 * token) % 280 + 5 for token in range(20)]


def headed(*rests: int) -> list[Example]:
    """Prompts that begin with the template and go on with so many tokens."""
    tails = [[(29 * row + 7 * token) % 290 + 2 for token in range(rest)] for row, rest in enumerate(rests)]
    return [Example([*TEMPLATE, *tail], len(TEMPLATE) + len(tail), None, "", "", 1) for tail in tails]


def intervened(
    positions: str = "f3+l3",
    *,
    family: str = "llama",
    base: BaseModel | None = None,
    method: str = "loreft",
    component: str = "block_output",
    layers: str = "all",
    rank: int = 2,
    tied: bool = True,
    seed: int = 3,
) -> IntervenedModel:
    """A model whose edits show, but leave answers different from each other: a large bias would be all there is."""
    model = build_intervened(
        base or base_of(family),
        method=method,
        layers=layers,
        component=component,
        positions=Positions.parse(positions),
        tied=tied,
        rank=None if method == "red" else rank,
        init="paper",
        dropout=0.0,
        dropout_on="delta",
        seed=seed,
    )
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.bank.named_parameters():
            parameter *= 0.1 if name == "source_bias" else 1
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise).to(parameter.device)
    return model.eval()


def step_logits(model: IntervenedModel, ids: list[int], prompt_length: int, positions: str) -> Tensor:
    """Logits of the next token of an unpadded sequence, run whole, with its edits and without a cache."""
    groups = Positions.parse(positions).groups(tied=True)
    rows = {group.name: torch.tensor(group.indices(prompt_length, len(ids))).long() for group in groups}
    rows = {name: each.to(model.device) for name, each in rows.items()}
    with torch.no_grad(), model, model.editing(rows):
        found = model.base_model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    logits: Tensor = found.logits[0, -1]
    return logits


def recomputed(model: IntervenedModel, example: Example, positions: str, steps: int) -> list[int]:
    """Greedy decoding by full recomputation, up to its end."""
    ids, new = list(example.input_ids), []
    for _ in range(steps):
        new.append(int(step_logits(model, ids, example.prompt_length, positions).argmax()))
        ids.append(new[-1])
        if new[-1] == 0:
            break
    return new


def tokens(
    model: IntervenedModel,
    prompts: list[Example],
    positions: str,
    decoding: Decoding,
    *,
    way: str = "slots",
    size: int = 9,
) -> list[list[int]]:
    """New tokens of each prompt up to its end, by one of the two ways."""
    decoder = Decoder.of(model, Positions.parse(positions).groups(tied=True), tokenizer=TOKENIZER)
    requests = requests_of(prompts, member=1)
    if way == "slots":
        found = from_slots(decoder, requests, decoding, size=size)
    else:
        found = generate(model.base_model, decoder.stack, requests, tokenizer=TOKENIZER, decoding=decoding)
    return [row[: row.index(0) + 1] if 0 in row else row for row in found]


def from_slots(decoder: Decoder, requests: list[Request], decoding: Decoding, *, size: int = 9) -> list[list[int]]:
    """New tokens of each request, decoded from so many slots."""
    assert decoder.why_not_slots(decoding) is None
    done = {
        each.index: each.tokens for each in decoder.progress(requests, decoding=decoding, batch_size=size) if each.done
    }
    return [done[index] for index in range(len(requests))]
