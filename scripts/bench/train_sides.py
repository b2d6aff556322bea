"""What scripts/bench/train.py measures: the plan, the rows, and a step of each side, which imports what it measures."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embedding
    "tiny": (256, 704, 6, 8, 8, 4096, True),
    "gpt2": (768, 3072, 12, 12, 12, 50257, True),  # GPT-2 small's sizes
    "1b": (2048, 8192, 16, 32, 8, 128256, True),  # Llama-3.2-1B
    "8b": (4096, 14336, 32, 32, 8, 128256, False),  # Llama-3-8B
    "70b": (8192, 28672, 80, 64, 8, 128256, False),  # Llama-3-70B
}
MIXES = {"commonsense": ((40, 199), (2, 11)), "alpaca": ((60, 400), (20, 400))}  # tokens of prompt and answer
ROWS, BATCHES = 32, 4  # in a step; drawn, one after the other and again
Row = tuple[list[int], int]  # tokens, prompt length
Step = Callable[[list[Row]], torch.Tensor]  # one optimizer step on a global batch; its loss


@dataclass(frozen=True)
class Plan:
    """What every side is asked to train."""

    shape: str
    mix: str
    device: str
    positions: str
    layers: str
    rank: int
    budget: int

    @property
    def ends(self) -> tuple[int, int]:
        """(first, last) positions."""
        match = re.fullmatch(r"f(\d+)\+l(\d+)", self.positions)
        if match is None:
            raise ValueError(f"positions {self.positions}: the peers know f7+l7 and the like")
        return int(match[1]), int(match[2])

    @property
    def chosen(self) -> list[int]:
        """Numbers of the edited layers."""
        return list(range(SHAPES[self.shape][2])) if self.layers == "all" else [int(n) for n in self.layers.split(";")]


def draw(mix: str, vocabulary: int, batches: int) -> list[list[Row]]:
    """The same rows on every side."""
    chance = random.Random(0)
    prompt, answer = MIXES[mix]

    def row() -> Row:
        length = chance.randint(*prompt)
        return [chance.randrange(10, vocabulary) for _ in range(length + chance.randint(*answer))], length

    return [[row() for _ in range(ROWS)] for _ in range(batches)]


def llama_config(shape: str) -> Any:
    """The configuration of a shape."""
    from transformers import LlamaConfig

    hidden, inner, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
    )


def random_llama(plan: Plan) -> Any:
    """The shape with random weights, bfloat16 on a GPU, frozen."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if plan.device == "cuda" else torch.float32)
    with torch.device(plan.device):
        model = LlamaForCausalLM(llama_config(plan.shape))
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def padded(rows: list[Row], device: str) -> dict[str, torch.Tensor]:
    """What the peers' collators make: right-padded ids, mask and labels of the answers."""
    width = max(len(tokens) for tokens, _ in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for index, (tokens, prompt) in enumerate(rows):
        ids[index, : len(tokens)] = torch.tensor(tokens)
        mask[index, : len(tokens)] = 1
        labels[index, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return {key: value.to(device) for key, value in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def side_reft(plan: Plan, *, compiled: bool = True, cached: bool = True, float8: bool = False) -> Step:
    """Our loop's own optimizer step, carried out as `reft train` chooses to, but for what is asked here."""
    from ours import stepping, trainer_of

    from reft_cli.models.float8 import to_float8

    model = random_llama(plan)
    if float8:
        to_float8(model)
    trainer = trainer_of(model, plan, compiled=compiled, cached=cached)
    entered = ExitStack()  # for as long as the process lives; a context that nobody holds ends at once
    take_step = entered.enter_context(stepping(trainer))

    def step(rows: list[Row], _: ExitStack = entered) -> torch.Tensor:
        loss, batch = take_step()
        assert len(batch.examples) == len(rows) and batch.examples[0].input_ids == rows[0][0]
        return loss

    return step


def side_pyreft(plan: Plan) -> Step:
    """pyreft's trainer's compute_loss with its own model, interventions and locations; AdamW over them."""
    import pyreft

    model = random_llama(plan)
    hidden, (first, last) = SHAPES[plan.shape][0], plan.ends
    dtype = torch.bfloat16 if plan.device == "cuda" else torch.float32
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": plan.rank,
            "intervention": pyreft.LoreftIntervention(embed_dim=hidden, low_rank_dimension=plan.rank, dtype=dtype),
        }
        for layer in plan.chosen
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations), set_device=False)
    reft.set_device(plan.device)
    reft.train()
    optimizer = torch.optim.AdamW([p for p in reft.parameters() if p.requires_grad], lr=9e-4, weight_decay=0.0)

    def step(rows: list[Row]) -> torch.Tensor:
        batch = padded([([0, *tokens], prompt + 1) for tokens, prompt in rows], plan.device)  # pyreft's sink token
        batch["attention_mask"][:, 0] = 0
        locations = [
            pyreft.get_intervention_locations(
                last_position=prompt,
                first_n=first,
                last_n=last,
                num_interventions=len(plan.chosen),
                share_weights=True,
            )
            for _, prompt in rows
        ]
        units = torch.tensor(locations).permute(1, 0, 2) + 1
        _, output = reft(
            {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]},
            unit_locations={"sources->base": (None, units.tolist())},
            labels=batch["labels"],
            subspaces=None,
        )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in reft.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss: torch.Tensor = output.loss.detach()
        return loss

    return step


def side_adapters(plan: Plan) -> Step:
    """AdapterHub's LoReFT; its float32 edits of a bfloat16 model need autocast."""
    import adapters

    model, (first, last) = random_llama(plan), plan.ends
    adapters.init(model)
    config = adapters.LoReftConfig(
        layers=plan.chosen, prefix_positions=first, suffix_positions=last, r=plan.rank, tied_weights=True, dropout=0.0
    )
    model.add_adapter("reft", config=config)
    model.train_adapter("reft")
    model.to(plan.device)
    return trained(model, plan)


def side_lora(plan: Plan) -> Step:
    """PEFT's LoRA on q and v."""
    import peft

    config = peft.LoraConfig(
        r=plan.rank, target_modules=["q_proj", "v_proj"], layers_to_transform=plan.chosen, task_type="CAUSAL_LM"
    )
    return trained(peft.get_peft_model(random_llama(plan), config), plan, autocast=False)


def trained(model: Any, plan: Plan, *, autocast: bool = True) -> Step:
    """The plain training step of a model that takes labels: AdamW over what needs a gradient, clipped at 1."""
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=9e-4, weight_decay=0.0)
    mixed = autocast and plan.device == "cuda"

    def step(rows: list[Row]) -> torch.Tensor:
        with torch.autocast(plan.device, dtype=torch.bfloat16, enabled=mixed):
            output = model(**padded(rows, plan.device), use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss: torch.Tensor = output.loss.detach()
        return loss

    return step


def side_frozen(plan: Plan) -> Step:
    """The frozen model forward and backward to its embeddings, and nothing else."""
    model = random_llama(plan).train()

    def step(rows: list[Row]) -> torch.Tensor:
        batch = padded(rows, plan.device)
        embedded = model.get_input_embeddings()(batch.pop("input_ids")).requires_grad_(True)
        output = model(inputs_embeds=embedded, use_cache=False, **batch)
        output.loss.backward()
        loss: torch.Tensor = output.loss.detach()
        return loss

    return step


SIDES: dict[str, Callable[[Plan], Step]] = {
    "reft": side_reft,
    "reft-plain": partial(side_reft, compiled=False),
    "reft-uncached": partial(side_reft, cached=False),
    "reft-float8": partial(side_reft, float8=True),
    "pyreft": side_pyreft,
    "adapters": side_adapters,
    "lora": side_lora,
    "frozen": side_frozen,
}
