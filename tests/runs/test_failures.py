"""What a run that ends badly leaves behind and says; how training comes to it is in test_train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from reft_cli.errors import MemoryExhausted, ModelError, ReftError
from reft_cli.runfolder import RunFolder
from reft_cli.runs.failures import failures_noted
from reft_cli.spec.schema import Spec
from reft_cli.training.observer import NullObserver

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.40 GiB. GPU 0 has 23.7 GiB")
PROBED = torch.OutOfMemoryError("with one row of 2,048 tokens at a time: CUDA out of memory. Tried to allocate 9 GiB")


class Unsupported(Exception):
    """Stands for an error of torch's compiler."""

    __module__ = "torch._dynamo.exc"


@pytest.mark.parametrize(
    ("error", "train", "kind", "said"),
    [
        (
            FULL,
            {},
            MemoryExhausted,
            "CUDA out of memory; 1.40 GiB more were needed.\n"
            "  Try, in order: train.micro_batch_size: 1; train.gradient_checkpointing: true; model.quantization: nf4; "
            "data.max_length: 256. The last two change the result.",
        ),
        (
            PROBED,
            {"gradient_checkpointing": True},
            MemoryExhausted,
            "CUDA out of memory with one row of 2,048 tokens at a time; 9 GiB more were needed.\n"
            "  Try, in order: model.quantization: nf4; data.max_length: 256. The last two change the result.",
        ),
        (
            RuntimeError("CUDA error: the GPU is lost\nsee the manual"),
            {},
            ReftError,
            "the GPU failed: CUDA error: the GPU is lost. Put that right and go on with --resume.",
        ),
        (
            Unsupported("\n  no such operator\n"),
            {},
            ModelError,
            "train.compile: on is not possible for this model: no such operator; write auto or off",
        ),
        (KeyError("x"), {}, KeyError, "'x'"),  # a fault of ours stays what it is
    ],
)
def test_what_ends_a_run_is_noted_and_becomes_advice(
    tmp_path: Path, error: Exception, train: dict[str, Any], kind: type[Exception], said: str
):
    run = RunFolder.create(tmp_path / "x")
    run.begin(command=["reft"], facts={})
    spec = Spec.model_validate({"model": "m", "train": train})
    with pytest.raises(kind) as caught, failures_noted(run, spec, NullObserver()):
        raise error
    assert (type(caught.value), str(caught.value)) == (kind, said)
    record = run.read()
    assert record["status"] == "failed" and record["exit_code"] == getattr(caught.value, "code", 1)
    assert record["reason"] == (said if isinstance(caught.value, ReftError) else "KeyError: 'x'")
