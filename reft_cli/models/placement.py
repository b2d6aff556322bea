"""A base that one process lays out over several devices: GPUs, then the machine's memory, then its disk (Accelerate).

Each block runs on its own device, or on the first one if it lies in memory or on disk, from where its weights are
fetched for each pass. What passes between blocks is moved by Accelerate's hooks, what edits a block goes where its
hidden states are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

ELSEWHERE = ("cpu", "disk")  # places of weights that a first GPU computes with
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SHARE = 0.9  # of the machine's free memory that weights may take if nobody says how much


def size_of(text: str) -> int:
    """The bytes of a size such as 20GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]i?B)", text)
    assert match is not None, "the spec has looked at it"
    return int(float(match[1]) * UNITS[match[2]])


def spreading(device: torch.device, max_memory: Mapping[str, str] | None) -> dict[str, Any]:
    """What transformers is to be told, so that it lays a model out. On a CPU no GPU takes part."""
    limits: dict[int | str, int] | None = None
    if max_memory is not None:
        limits = {int(name) if name.isdecimal() else name: size_of(text) for name, text in max_memory.items()}
    elif device.type == "cpu":
        import psutil  # what Accelerate asks too

        limits = {"cpu": int(SHARE * psutil.virtual_memory().available)}
    return {"device_map": "auto", "max_memory": limits}


def places_of(model: nn.Module) -> dict[str, str]:
    """Where each part of a spread model lies, by its path: cuda:N, cpu or disk. Empty if it lies on one device."""
    found = getattr(model, "hf_device_map", {})
    places = {path: f"cuda:{place}" if isinstance(place, int) else str(place) for path, place in found.items()}
    return places if len(set(places.values())) > 1 or "disk" in places.values() else {}


def is_spread(model: nn.Module) -> bool:
    """Whether a model lies on several devices."""
    return bool(places_of(model))


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights of a model are fetched for each pass."""
    return any(parameter.is_meta for parameter in model.parameters())


def devices_of(model: nn.Module) -> list[torch.device]:
    """The devices that a model runs on, that of its input first."""
    places = dict.fromkeys(places_of(model).values())
    running = [torch.device(place) for place in places if place not in ELSEWHERE]
    if places:
        return running or [torch.device("cpu")]
    return [next(model.parameters()).device]


def entry_device(model: nn.Module) -> torch.device:
    """Where a model takes its input."""
    return devices_of(model)[0]


def summary(model: nn.Module, blocks: str, count: int) -> dict[str, int]:
    """How many of `count` blocks lie where, of a spread model; `blocks` is their list's path."""
    places = places_of(model)
    paths = [f"{blocks}.{number}" for number in range(count if places else 0)]
    return dict(Counter(_place(places, path) for path in paths))


def _place(places: Mapping[str, str], path: str) -> str:
    """That of a block, or of what it stands in; of its parts, if it was cut up."""
    around = [name for name in places if f"{path}.".startswith(f"{name}.") or not name]
    inside = sorted({place for name, place in places.items() if name.startswith(f"{path}.")})
    return places[max(around, key=len)] if around else " and ".join(inside)
