"""`reft doctor`: what reft runs on, as the block for a bug report. Whether a hub token is there, never the token."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

from reft_cli.cli import console, options, progress
from reft_cli.environment import versions


def doctor(as_json: options.AsJson = False) -> None:
    """Print versions, devices and caches, for bug reports."""
    found = {"versions": versions(), "machine": _machine(), "torch": _torch(), "hub": _hub(), "cache": _cache()}
    if as_json:
        console.result_json(found)
        return
    rows = [_line(part, key, value) for part, facts in found.items() for key, value in facts.items()]
    console.result_table(["", ""], rows)


def _machine() -> dict[str, Any]:
    return {
        "system": platform.system(),
        "release": platform.release(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
    }


def _torch() -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    return {
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "nccl": _nccl() if cuda else None,
        "mps": torch.backends.mps.is_available(),
        "devices": [_device(index) for index in range(torch.cuda.device_count())] if cuda else [],
    }


def _nccl() -> str | None:
    import torch

    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _device(index: int) -> dict[str, Any]:
    import torch

    facts = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "memory_bytes": total,
        "free_bytes": free,
        "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def _hub() -> dict[str, Any]:
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return {
        "cache": str(cache),
        "cached_models": len(list(cache.glob("models--*"))),
        "free_bytes": shutil.disk_usage(existing).free,
        "offline": constants.is_offline_mode(),
        "token": get_token() is not None,
    }


def _cache() -> dict[str, Any]:
    from reft_cli.data.cache import LIMIT, cache_folder, cache_size

    folder = cache_folder()
    return {
        "folder": str(folder) if folder else None,
        "size_bytes": cache_size() if folder else 0,
        "limit_bytes": LIMIT,
    }


def _line(part: str, key: str, value: object) -> list[str]:
    if key.endswith("_bytes") and isinstance(value, int):
        return [f"{part} {key.removesuffix('_bytes')}", progress.gibibytes(value)]
    return [f"{part} {key}".replace("_", " "), _shown(value)]


def _shown(value: object) -> str:
    if isinstance(value, list):
        return "; ".join(_shown(item) for item in value) or "none"
    if isinstance(value, dict):
        free, total = progress.gibibytes(value["free_bytes"]), progress.gibibytes(value["memory_bytes"])
        return f"{value['name']} ({free} of {total} free, compute capability {value['capability']})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
