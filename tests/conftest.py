"""Fixtures that every test may ask for; what they are made of is in tiny_models.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on tiny models threads only wait for each other

os.environ["REFT_CACHE"] = "off"  # tests of the cache name a folder of their own

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton, where it is installed: kernels are defined to run on a CPU

from transformers import PreTrainedTokenizerFast

from reft_cli.models.loading import BaseModel
from tiny_models import base_of, byte_tokenizer, decoder


@pytest.fixture
def base() -> Callable[[str], BaseModel]:
    return base_of


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama and the byte tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    decoder("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
