"""Loading takes no second copy of the weights in the machine's memory, in any form of the base. Linux tells."""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from processes import run_as
from reft_cli.models.loading import BaseSource, load_causal_lm
from reft_cli.parallel.collective import joined

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 90 MB in bfloat16, most of it in eight blocks."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=768, intermediate_size=2048, num_hidden_layers=7, num_attention_heads=8
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="30MB")
    return path


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


MMAP_THRESHOLD = -3  # of mallopt


def highest(source: BaseSource) -> int:
    """The most memory that loading a base takes of this process, in bytes."""
    # Every tensor gets pages of its own; else what is freed stays with the process now and then, and counts.
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 65_536)
    with joined(device="cpu"):
        start, found, done = anonymous(), [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.001):
                found.append(anonymous() - start)

        watching = threading.Thread(target=watch)
        watching.start()
        loaded = load_causal_lm(source)
        done.set()
        watching.join()
        assert loaded.model.config.num_hidden_layers == 7
        return max(found)


@pytest.mark.parametrize(
    ("given", "processes", "part"),
    [
        ({"dtype": "bfloat16"}, 1, 0.3),  # the file is mapped
        ({"dtype": "float32"}, 1, 2.5),  # twice the size, once
        ({"dtype": "bfloat16", "quantization": "float8"}, 1, 0.95),
        ({"dtype": "bfloat16", "shard": True}, 2, 0.75),  # half in each
    ],
    ids=["as stored", "wider", "float8", "sharded"],
)
def test_there_is_no_second_copy(folder: Path, given: dict, processes: int, part: float):
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    found = run_as(highest, BaseSource(str(folder), device="cpu", **given), count=processes)
    assert max(found) < part * size, [each / size for each in found]
