"""Our attention kernels attend as plain arithmetic does; on a CPU as Triton interprets them, where it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch

from reft_cli.models import attention, kernel_attention
from reft_cli.models.attention import attending
from reft_cli.models.kernel_attention import attend_by_kernels, why_not_kernels
from tiny_models import base_of

LENGTHS = [5, 0, 33, 66, 1]
GPU = torch.device("cuda")
CPU = torch.device("cpu")
TRITON = find_spec("triton") is not None


@pytest.fixture
def device() -> torch.device:
    """Where the kernels can run."""
    if not TRITON:
        pytest.skip("Triton is not installed")
    return GPU if torch.cuda.is_available() else CPU


def drawn(
    device: torch.device, lengths: list[int], *, size: int, heads: tuple[int, int] = (4, 2), dtype=torch.float32
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Query, key and value, what comes back to the outcome, and bounds."""
    chance = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), number, size) for number in (heads[0], heads[1], heads[1], heads[0])]
    *leaves, upstream = (torch.randn(shape, generator=chance).to(device, dtype) for shape in shapes)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return [leaf.requires_grad_() for leaf in leaves], upstream, bounds.to(device)


def plainly(leaves: list[torch.Tensor], bounds: torch.Tensor, window: int | None, head: int = 0) -> torch.Tensor:
    """In float32, one sequence at a time, with every score written out; the first one, the head, before each other."""
    parts = []
    for start, end in pairwise(bounds.tolist()):
        places = [*range(min(head, start)), *range(start, end)]
        q, k, v = (leaf[places].float().transpose(0, 1) for leaf in leaves)
        k, v = (each.repeat_interleave(len(q) // len(k), 0) for each in (k, v))
        seen = torch.ones(len(places), len(places), dtype=torch.bool, device=q.device).tril()
        if window is not None:
            seen &= seen.triu(1 - window)
        weights = (q @ k.transpose(1, 2) * 0.2).masked_fill(~seen, -torch.inf).softmax(-1)
        parts.append((weights @ v).transpose(0, 1)[len(places) - (end - start) :])
    return torch.cat(parts)


def with_slopes(outcome: torch.Tensor, leaves: list[torch.Tensor], upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return outcome.detach().float(), *(each.float() for each in torch.autograd.grad(outcome, leaves, upstream))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in rows that are not there
@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("heads", "window"), [((4, 2), None), ((4, 2), 7), ((3, 3), None), ((12, 2), 7), ((8, 1), None)]
)
def test_kernels_attend_within_each_sequence(device: torch.device, heads: tuple[int, int], window: int | None):
    leaves, upstream, bounds = drawn(device, LENGTHS, size=16, heads=heads)
    turned = [leaf.transpose(0, 1).contiguous().transpose(0, 1) for leaf in leaves]  # heads before tokens in memory
    ours = attend_by_kernels(*turned, bounds, longest=max(LENGTHS), scaling=0.2, window=window)
    wanted = with_slopes(plainly(leaves, bounds, window), leaves, upstream)
    precise = {"rtol": 1e-4, "atol": 1e-5} if device == CPU else {"rtol": 2e-2, "atol": 2e-2}  # a GPU's are 19 bits
    torch.testing.assert_close(with_slopes(ours, leaves, upstream), wanted, **precise)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("lengths", "heads", "window"),
    [
        ([43, 5, 0, 33, 66, 1], (4, 2), None),
        ([43, 5, 0, 33, 66, 1], (4, 2), 7),
        ([66, 5, 3], (3, 3), 50),
        ([64, 64, 1], (12, 2), None),
        ([17, 100], (8, 1), 30),
        ([0, 5, 33], (4, 2), None),  # no head this time, where there is room for one
    ],
)
def test_kernels_attend_to_a_head_that_sequences_share(
    device: torch.device, lengths: list[int], heads: tuple[int, int], window: int | None
):
    leaves, upstream, bounds = drawn(device, lengths, size=16, heads=heads)
    for room in {max(lengths[0], 1), 80}:
        ours = attend_by_kernels(*leaves, bounds, longest=max(lengths), scaling=0.2, window=window, head=room)
        wanted = with_slopes(plainly(leaves, bounds, window, lengths[0]), leaves, upstream)
        precise = {"rtol": 1e-4, "atol": 1e-5} if device == CPU else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(with_slopes(ours, leaves, upstream), wanted, **precise)


def test_why_not_says_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    assert why_not_kernels(CPU, 64, 4) == "they are written for NVIDIA GPUs"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert why_not_kernels.__wrapped__(GPU, 64, 4) == "the GPU is too old"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert why_not_kernels.__wrapped__(GPU, 96, 4) == "a head of 96 numbers is none of 16, 32, 64, 128"
    monkeypatch.setattr(kernel_attention, "find_spec", lambda _: None)
    assert why_not_kernels.__wrapped__(GPU, 64, 4) == "Triton is not installed"


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_trial_compares_with_plain_arithmetic(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.half)  # Triton's interpreter multiplies no bfloat16
    assert kernel_attention._error_of_trial(device, 16, 2) < 0.002
    assert kernel_attention._error_of_trial(device, 16, 2, 43) < 0.002
    real = kernel_attention._plain
    monkeypatch.setattr(kernel_attention, "_plain", lambda *given: real(*given) * 1.01)
    assert kernel_attention._error_of_trial(device, 16, 2) > 0.002
    assert 0.002 < kernel_attention._error_of_trial(device, 16, 2, 43) < 0.02
    monkeypatch.setattr(kernel_attention, "_plain", lambda *given: real(*given[:-1], 0))  # that knows of no head
    assert kernel_attention._error_of_trial(device, 16, 2, 43) > 0.1
    monkeypatch.setattr(kernel_attention, "_plain", lambda *given: real(*given) * torch.nan)
    assert not kernel_attention._error_of_trial(device, 16, 2) < 0.002


@pytest.mark.skipif(not TRITON, reason="errors that Triton raises")
@pytest.mark.parametrize("error", [0.5, RuntimeError("no C compiler\nat all"), float("nan")])
def test_a_trial_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, error: float | Exception):
    def trial(*_: object) -> float:
        if isinstance(error, Exception):
            raise error
        return error

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(kernel_attention, "_error_of_trial", trial)
    with pytest.warns(RuntimeWarning, match="torch's attention is used in place of our kernels"):
        reason = why_not_kernels.__wrapped__(GPU, 64, 4)
    with pytest.warns(RuntimeWarning, match="rows do not share a head"):
        assert why_not_kernels.__wrapped__(GPU, 64, 4, True) == reason
    assert reason in (
        "they are off by 0.500 of what plain arithmetic gives",
        "they are off by nan of what plain arithmetic gives",
        "they do not run here (no C compiler)",
    )


def test_kernels_attend_only_inside_packed_attention(monkeypatch: pytest.MonkeyPatch):
    model = base_of("llama").model
    size = model.config.head_dim
    monkeypatch.setattr(attention, "why_not_kernels", lambda _, *given: None if given == (size, 2) else "others")
    assert not attention._heads_by_kernels
    with attending(model):
        assert attention._heads_by_kernels == {size}
        with attending(model, "sdpa"):
            assert not attention._heads_by_kernels
        assert attention._heads_by_kernels == {size}
    assert not attention._heads_by_kernels


@pytest.mark.parametrize("head", [1, 7, 40])
def test_sequences_go_on_from_a_known_head(head: int, monkeypatch: pytest.MonkeyPatch):
    """What kernels are asked for is what attention without them gives."""

    def kernels(query, key, value, bounds, *, longest, scaling, window, head):
        assert longest >= max(end - start for start, end in pairwise(bounds.tolist())) and window is None
        return torch.cat(
            [kernel_attention._plain(query, key, value, *span, head) for span in pairwise(bounds.tolist())]
        )

    monkeypatch.setattr(attention, "attend_by_kernels", kernels)
    monkeypatch.setattr(attention, "_heads_by_kernels", {16})
    lengths, known = [9, 4, 4, 1], tuple(torch.randn(1, 2, head, 16) for _ in range(2))
    query, key, value = (torch.randn(1, heads, sum(lengths), 16) for heads in (4, 2, 2))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    found = attention._after(known, query, key, value, bounds, max(lengths), None, None)
    wanted = attention._by_length(query, key, value, bounds.tolist(), None, None, known=known)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("window", [None, 50])
def test_half_types_attend_as_float32_does_and_always_alike(size: int, window: int | None):
    assert why_not_kernels(GPU, size, 4) is None
    lengths = [40, 199, 64, 1, 0, 700, 128]
    for dtype in (torch.bfloat16, torch.float16):
        leaves, upstream, bounds = drawn(GPU, lengths, size=size, heads=(32, 8), dtype=dtype)

        def ours(leaves=leaves, bounds=bounds) -> torch.Tensor:
            return attend_by_kernels(*leaves, bounds, longest=700, scaling=0.2, window=window)

        found = with_slopes(ours(), leaves, upstream)
        for got, wanted in zip(found, with_slopes(plainly(leaves, bounds, window), leaves, upstream), strict=True):
            assert float((got - wanted).norm() / wanted.norm()) < 0.006
        assert all(map(torch.equal, found, with_slopes(ours(), leaves, upstream)))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("window", [None, 50])
def test_half_types_attend_to_a_shared_head_as_float32_does_and_always_alike(size: int, window: int | None):
    assert why_not_kernels(GPU, size, 4, True) is None
    lengths = [43, 40, 199, 64, 1, 0, 700, 128]
    for dtype in (torch.bfloat16, torch.float16):
        leaves, upstream, bounds = drawn(GPU, lengths, size=size, heads=(32, 8), dtype=dtype)

        def ours(leaves=leaves, bounds=bounds) -> torch.Tensor:
            return attend_by_kernels(*leaves, bounds, longest=700, scaling=0.2, window=window, head=64)

        found = with_slopes(ours(), leaves, upstream)
        for got, wanted in zip(found, with_slopes(plainly(leaves, bounds, window, 43), leaves, upstream), strict=True):
            assert float((got - wanted).norm() / wanted.norm()) < 0.006
        assert all(map(torch.equal, found, with_slopes(ours(), leaves, upstream)))


@pytest.mark.gpu
def test_kernels_are_compiled_around_and_recorded():
    leaves, upstream, bounds = drawn(GPU, [40, 199, 64], size=64, heads=(32, 8), dtype=torch.bfloat16)

    def attend(longest: int, head: int = 0) -> torch.Tensor:
        return attend_by_kernels(*leaves, bounds, longest=longest, scaling=0.125, window=None, head=head)

    compiled = torch.compile(attend, dynamic=True, fullgraph=True)
    for head in (40, 64, 0):
        wanted = with_slopes(attend(199, head), leaves, upstream)
        for longest in (199, 256):
            assert all(map(torch.equal, with_slopes(compiled(longest, head), leaves, upstream), wanted))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.autograd.set_multithreading_enabled(False), torch.cuda.graph(graph):
        found = with_slopes(attend(199), leaves, upstream)
    graph.replay()
    assert all(map(torch.equal, found, wanted))
