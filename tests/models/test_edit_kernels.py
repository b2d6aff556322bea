"""The kernels of an edit give what the plain arithmetic gives: on a GPU, and on a CPU through Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reft_cli.interventions import build_bank
from reft_cli.interventions.bank import Bank
from reft_cli.models.editing import RowEditor

SITES = 3
CASES = [(14, 6, 24, 3), (12, 5, 520, 2), (9, 1, 32, 1), (12, 5, 40, 17), (12, 0, 32, 4)]  # tokens, rows, width, rank
LARGE = [(9500, 448, 4096, 8), (700, 448, 2048, 8), (5000, 3000, 1024, 64), (20000, 20000, 4096, 4)]


def bank_of(width: int, rank: int, method: str, device: str) -> Bank:
    bank = build_bank(
        method, sites=SITES, width=width, rank=rank, init="paper", dropout=0.0, dropout_on="delta",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return bank.to(device).train()


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


class Kernels(RowEditor):
    """On any device: the interpreter runs them on a CPU."""

    def __call__(self, h: torch.Tensor, rows: torch.Tensor, site: int) -> torch.Tensor:
        from reft_cli.models.edit_kernels import EditRows

        return EditRows.apply(h, rows, *self.bank.values(site))


def found(
    editor: type[RowEditor], case: tuple[int, int, int, int], *, dtype: torch.dtype, device: str,
    method: str = "loreft", laid: str = "plain", twice: bool = False, below: bool = True,
) -> dict[str, torch.Tensor | None]:  # fmt: skip
    """The edited h, its gradient, and those of the bank's parameters, over two of its sites."""
    tokens, count, width, rank = case
    bank, chance = bank_of(width, rank, method, device), torch.Generator().manual_seed(1)
    bank.refresh()
    h, upstream = (torch.randn(1, tokens, width, generator=chance).to(device, dtype) for _ in range(2))
    rows = torch.randperm(tokens, generator=chance)[:count].to(device)
    if twice:
        rows = torch.cat([rows, rows[-1:].expand(4)])
    h.requires_grad_(below)
    edit = editor(bank)
    edited = h
    for site in (2, 0):
        edited = edit(strided(edited) if laid == "strided" else edited, rows, site)
    if laid == "expanded":
        edited.sum().backward()
    else:
        edited.backward(strided(upstream) if laid == "strided" else upstream)
    bank.backpropagate()
    gradients = {name: parameter.grad for name, parameter in bank.named_parameters()}
    return {"edited": edited.detach(), "below": h.grad, **gradients}


def check(case: tuple[int, int, int, int], dtype: torch.dtype, device: str, **more: object) -> None:
    """Kernels against the plain arithmetic."""
    ours, plain = (found(editor, case, dtype=dtype, device=device, **more) for editor in (Kernels, RowEditor))
    small = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for name, wanted in plain.items():
        if wanted is None:
            assert ours[name] is None, name
            continue
        assert torch.isfinite(wanted).all()
        scale = 1.0 if name in ("edited", "below") else float(wanted.abs().max()) + 1e-6
        torch.testing.assert_close(
            ours[name], wanted, rtol=small, atol=small * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_gradients_asked_for(device: str) -> None:
    """Recorded passes ask for the gradients of the leaves; what is added to .grad already is not given again."""
    sums = []
    for editor in (Kernels, RowEditor):
        bank = bank_of(32, 4, "loreft", device)
        bank.refresh()
        h = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0)).to(device)
        edited = editor(bank)(h, torch.tensor([0, 4], device=device), 1)
        slopes = torch.autograd.grad(edited.square().sum(), bank.leaves(), allow_unused=True)
        for leaf, slope in zip(bank.leaves(), slopes, strict=True):
            if slope is not None:
                leaf.grad += slope
        bank.backpropagate()
        sums.append({name: parameter.grad for name, parameter in bank.named_parameters()})
    torch.testing.assert_close(*sums)


def check_small(device: str) -> None:
    """What a small matrix of cases finds, on any device."""
    for case in CASES:
        check(case, torch.float32, device)
    for dtype in (torch.bfloat16, torch.float16):
        check(CASES[0], dtype, device)
    check(CASES[0], torch.float32, device, laid="strided")
    check(CASES[0], torch.float32, device, laid="expanded", below=False)
    check(CASES[0], torch.bfloat16, device, twice=True)
    check(CASES[0], torch.float32, device, method="lobireft")
    check_gradients_asked_for(device)


def check_many(device: str) -> None:
    """The way of many rows, made to begin at few."""
    from reft_cli.models import edit_kernels

    before = edit_kernels.MANY, edit_kernels.SHARE
    edit_kernels.MANY, edit_kernels.SHARE = 8, 5
    try:
        check((14, 12, 40, 3), torch.float32, device)
    finally:
        edit_kernels.MANY, edit_kernels.SHARE = before


has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@has_triton
@pytest.mark.parametrize("name", ["_project", "_expand", "_outer"])
@pytest.mark.parametrize("rows", [4, 16, 64])
def test_no_kernel_is_made_a_product_of_tensor_cores(name: str, rows: int):
    """Triton turns sums of products that look like a matrix product into one, in TF32; compiled here, not run."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from reft_cli.models import edit_kernels

    kernel = getattr(edit_kernels, name)
    shape = {"D": 128, "R": 8, "BR": 8, "BN": rows, "BD": 64, "P": 2, "BP": 2}
    constants = {key: shape.get(key, True) for key in kernel.arg_names if key.isupper()}
    types = {"count": "i32", "share": "i32", "rows": "*i64", "h": "*bf16", "kept": "*bf16", "out": "*bf16"}
    types |= {"x": "*bf16", "g": "*bf16"} if name == "_outer" else {}
    signature = {key: "constexpr" if key in constants else types.get(key, "*fp32") for key in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(key),): value for key, value in constants.items()})
    text = compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    assert "tt.store" in text and "tt.dot" not in text


@has_triton
def test_kernels_are_the_plain_arithmetic_in_the_interpreter():
    """In a process of its own: Triton reads the switch when it is imported."""
    folders = [str(Path(__file__).parent), *sys.path]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(folders),
    }
    code = f"from {Path(__file__).stem} import *\ncheck_small('cpu')\ncheck_many('cpu')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
def test_kernels_are_the_plain_arithmetic():
    check_small("cuda")
    check_many("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LARGE)
def test_large_edits_are_the_plain_arithmetic(case: tuple[int, int, int, int], dtype: torch.dtype):
    check(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE)
def test_the_same_input_gives_the_same_bits(case: tuple[int, int, int, int]):
    first, second = (found(Kernels, case, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.gpu
def test_a_fused_editor_takes_the_kernels_where_they_apply(monkeypatch: pytest.MonkeyPatch):
    from reft_cli.models.edit_kernels import EditRows

    taken: list[torch.dtype] = []
    real = EditRows.apply
    monkeypatch.setattr(EditRows, "apply", lambda h, *more: taken.append(h.dtype) or real(h, *more))
    rows = torch.tensor([1, 3], device="cuda")

    def edit(dtype: torch.dtype, method: str = "loreft", rank: int = 4, width: int = 32) -> None:
        bank = bank_of(width, rank, method, "cuda")
        bank.refresh()
        editor = RowEditor(bank)
        for wanted in (False, True):
            editor.fuse(wanted)
            editor(torch.randn(1, 9, width, device="cuda", dtype=dtype), rows, 0)

    edit(torch.bfloat16)
    edit(torch.float32, "direft")
    assert taken == [torch.bfloat16, torch.float32]
    edit(torch.float64)
    edit(torch.float32, rank=130, width=256)
    bank = bank_of(32, 4, "loreft", "cuda")
    bank.dropout = 0.5
    bank.refresh()
    editor = RowEditor(bank)
    editor.fuse(True)
    editor(torch.randn(1, 9, 32, device="cuda"), rows, 0)
    assert len(taken) == 2
