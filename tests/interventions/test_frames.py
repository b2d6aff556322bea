"""Orthonormal rows: how exact, how far, how they fail, and their gradient."""

import warnings

import pytest
import torch

from reft_cli.interventions.frames import orthonormal_rows


def conditioned(condition, *, sites=3, rank=8, width=256):
    """Random float32 weights [S, r, d] of a condition number, singular values spread evenly on a log scale."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(sites, rank, rank, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(sites, width, rank, generator=generator, dtype=torch.float64))[0]
    return (left * torch.tensor(condition).double().pow(-torch.linspace(0, 1, rank)) @ right.mT).float()


def error(frames):
    """max|R Rᵀ − I|."""
    wide = frames.double()
    return (wide @ wide.mT - torch.eye(frames.shape[-2], dtype=torch.float64)).abs().max().item()


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e3, 1e4, 1e5, 1e6, 3e6])
def test_rows_are_orthonormal_whatever_the_condition(condition):
    assert error(orthonormal_rows(conditioned(condition))) < 1e-6


@pytest.mark.parametrize("condition", [1e8, 1e10])
def test_rows_that_float32_cannot_tell_apart_become_nan(condition):
    assert orthonormal_rows(conditioned(condition)).isnan().all()


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e3, 1e15])
def test_scale_does_not_matter(scale):
    weight = conditioned(10.0)
    torch.testing.assert_close(orthonormal_rows(weight * scale), orthonormal_rows(weight), rtol=0, atol=1e-6)


def test_rows_of_very_different_length():
    weight = conditioned(10.0) * torch.logspace(-12, 12, 8)[:, None]
    assert error(orthonormal_rows(weight)) < 1e-6


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 9), (1, 9, 9), (2, 64, 64), (1, 128, 300)])
def test_shapes(shape):
    frames = orthonormal_rows(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert frames.shape == shape
    assert frames.dtype == torch.float32
    assert error(frames) < 1e-6


@pytest.mark.parametrize("damage", ["equal rows", "zero row", "a sum", "nan", "infinite"])
def test_a_damaged_site_is_nan_and_the_others_are_not(damage):
    weight = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    sound = orthonormal_rows(weight)
    site = weight[1]
    if damage == "equal rows":
        site[2] = site[0]
    elif damage == "zero row":
        site[2] = 0
    elif damage == "a sum":
        site[3] = site[0] + 2 * site[1]
    else:
        site[2, 5] = float(damage.removesuffix("inite"))
    frames = orthonormal_rows(weight)
    assert frames[1].isnan().all()
    torch.testing.assert_close(frames[[0, 2]], sound[[0, 2]])


def test_it_is_gram_schmidt():
    """Row i lies in the span of weights 0 … i, on the side of weight i: R Wᵀ is upper triangular, its diagonal > 0."""
    weight = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixed = orthonormal_rows(weight) @ weight.mT
    torch.testing.assert_close(mixed, mixed.triu())
    assert (mixed.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_orthonormal_rows_stay_as_they_are():
    frames = orthonormal_rows(torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(orthonormal_rows(frames), frames, rtol=0, atol=1e-7)


def test_gradient_against_finite_differences():
    weight = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(orthonormal_rows, weight)


@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_gradient_against_gram_schmidt(condition):
    """Autograd through one row after the other, in float64."""
    weight = conditioned(condition).double().requires_grad_()
    rows: list[torch.Tensor] = []
    for i in range(weight.shape[1]):
        row = weight[:, i]
        for _ in range(2):
            for above in rows:
                row = row - (row * above).sum(-1, keepdim=True) * above
        rows.append(row / row.norm(dim=-1, keepdim=True))
    slow, fast = torch.stack(rows, dim=1), orthonormal_rows(weight)
    torch.testing.assert_close(fast, slow)
    upstream = torch.randn(slow.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, actual = (torch.autograd.grad((frames * upstream).sum(), weight)[0] for frames in (slow, fast))
    assert ((actual - expected).norm() / expected.norm()).item() < 1e-9


def test_autocast_does_not_touch_it():
    weight = conditioned(100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(orthonormal_rows(weight), orthonormal_rows(weight.clone()), rtol=0, atol=0)
        assert error(orthonormal_rows(weight)) < 1e-6


@pytest.mark.gpu
def test_on_a_gpu_without_waiting_for_it():
    weight = conditioned(1e3).cuda().requires_grad_()
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    orthonormal_rows(weight)  # handles are made on first use, and that waits
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        frames = orthonormal_rows(weight)
        frames.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.backends.cuda.matmul.allow_tf32 = tf32
    assert error(frames.detach().cpu()) < 1e-6
    torch.testing.assert_close(frames.detach().cpu(), orthonormal_rows(weight.detach().cpu()), rtol=0, atol=1e-6)
    assert orthonormal_rows(torch.ones(1, 2, 5, device="cuda")).isnan().all()
    assert orthonormal_rows(torch.full((1, 2, 5), torch.nan, device="cuda")).isnan().all()
