"""The life of a bank: refresh, micro-batches, backpropagate, step; stale use; loading; casting; dropout."""

import copy
import io

import pytest
import torch

from reft_cli.interventions import METHODS, build_bank

SITES, WIDTH, RANK = 3, 24, 4
OPTIMIZERS = [{"fused": True}, {"foreach": True}, {"foreach": False}]


def make(method="loreft", **given):
    given = {"sites": SITES, "width": WIDTH, "init": "paper", "dropout": 0.0, "dropout_on": "delta"} | given
    given |= {"rank": None if method == "red" else RANK}
    return build_bank(method, generator=torch.Generator().manual_seed(0), **given)


def states(*, rows=6, seed=2, dtype=torch.float32):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def passes(bank, *, micro_batches, step=0):
    """Forward and backward of a fixed quadratic loss, all sites, in micro-batches."""
    for part in states(rows=12, seed=step).chunk(micro_batches):
        h = part
        for site in range(bank.sites):
            h = torch.tanh(h + bank.delta(site, h))
        (h - 0.5).square().sum().backward()


def train(bank, optimizer, *, steps, micro_batches=1, start=0):
    for step in range(start, start + steps):
        bank.refresh()
        passes(bank, micro_batches=micro_batches, step=step)
        bank.backpropagate()
        optimizer.step()
        optimizer.zero_grad()


def error(bank):
    rows = bank.rows().detach().double()
    return (rows @ rows.mT - torch.eye(RANK, dtype=torch.float64)).abs().max().item()


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_plain_autograd(method):
    """The detached leaves against the chain rule without them, in float64."""
    bank = make(method).double()
    bank.refresh()
    h = states(dtype=torch.float64).requires_grad_()
    (bank.delta(0, h).sin().sum() + bank.delta(2, h).square().sum()).backward()
    bank.backpropagate()
    direct = h.detach().clone().requires_grad_()
    folded = bank._fold()
    loss = folded.delta(0, direct).sin().sum() + folded.delta(2, direct).square().sum()
    expected = torch.autograd.grad(loss, [*bank.parameters(), direct])
    torch.testing.assert_close([parameter.grad for parameter in bank.parameters()] + [h.grad], list(expected))
    assert all((parameter.grad[1] == 0).all() for parameter in bank.parameters()), "site 1 was not used"


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_add_up(method):
    gradients = []
    for micro_batches in (1, 4):
        bank = make(method).double().train()
        bank.refresh()
        for part in states(rows=8, dtype=torch.float64).chunk(micro_batches):
            bank.refresh()  # free
            bank.delta(1, part).square().sum().backward()
        bank.backpropagate()
        gradients.append([parameter.grad for parameter in bank.parameters()])
    torch.testing.assert_close(*gradients)


def test_a_step_factorises_once(monkeypatch):
    calls = []
    cholesky = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda gram: (calls.append(1), cholesky(gram))[1])
    bank = make()
    train(bank, torch.optim.AdamW(bank.parameters()), steps=5, micro_batches=3)
    assert len(calls) == 5 * 2  # two rounds of Cholesky-QR
    bank.eval()
    for _ in range(4):
        bank.delta(0, states())
    assert len(calls) == 6 * 2


@pytest.mark.parametrize(
    ("method", "learning_rate"),
    [
        ("loreft", 4e-3),
        ("loreft", 0.1),
        ("loreft", 3.0),
        ("direft_orthogonal", 0.1),
        ("consreft", 3.0),
        ("lobireft", 3.0),
    ],
)
def test_rows_stay_orthonormal_for_a_thousand_steps(method, learning_rate):
    bank = make(method, sites=2)
    assert error(bank) < 1e-6
    optimizer = torch.optim.AdamW(bank.parameters(), lr=learning_rate, weight_decay=0.1)  # decays R's weight too
    train(bank, optimizer, steps=1000)
    assert error(bank) < 1e-6
    twin = make(method, sites=2)
    twin.load_state_dict(bank.state_dict())
    train(twin, torch.optim.AdamW(twin.parameters(), lr=learning_rate), steps=50)
    assert error(twin) < 1e-6


def test_decay_alone_does_not_touch_r():
    """What zeroes R in pyreft after one step: here the direction stays, and only the length of the weight changes."""
    bank = make("loreft").double()
    before = bank.rows().detach()
    optimizer = torch.optim.SGD(bank.parameters(), lr=1.0, weight_decay=0.1)
    for _ in range(20):
        for parameter in bank.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert bank.projection.norm() < 0.2 * RANK**0.5 * SITES**0.5
    torch.testing.assert_close(bank.rows(), before)


@pytest.mark.parametrize("options", OPTIMIZERS)
def test_stale_rows_cannot_be_used(options):
    """Fused optimizers do not tell autograd that they wrote; the bank has to notice all the same."""
    bank = make()
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1, **options)
    train(bank, optimizer, steps=1)
    with pytest.raises(RuntimeError, match="refresh"):
        bank.delta(0, states())
    bank.refresh()
    passes(bank, micro_batches=1)
    bank.backpropagate()
    bank.eval()
    before = bank.delta(0, states())  # between backpropagate and step, in eval mode: cached
    optimizer.step()
    after = bank.delta(0, states())
    assert (before - after).abs().max() > 1e-3
    torch.testing.assert_close(after, bank.fold().delta(0, states()), rtol=0, atol=0)


def test_gradients_that_wait_are_not_lost():
    bank = make()
    bank.refresh()
    passes(bank, micro_batches=1)
    with torch.no_grad():
        bank.projection.mul_(1.5)
    with pytest.raises(RuntimeError, match="backpropagate"):
        bank.refresh()
    bank.zero_grad()
    bank.refresh()
    bank.backpropagate()
    assert all((parameter.grad == 0).all() for parameter in bank.parameters())


def test_changing_the_weights_under_a_pass_is_an_error():
    bank = make()
    bank.refresh()
    loss = bank.delta(0, states()).sum()
    with torch.no_grad():
        bank.projection.mul_(1.5)
    bank.refresh()
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_validation_between_micro_batches_loses_nothing():
    expected, bank = make(), make()
    for each in (expected, bank):
        each.refresh()
        passes(each, micro_batches=1, step=0)
        if each is bank:
            each.eval()
            with torch.no_grad():
                each.delta(0, states())
            each.train()
        passes(each, micro_batches=1, step=1)
        each.backpropagate()
    torch.testing.assert_close(
        [parameter.grad for parameter in bank.parameters()], [parameter.grad for parameter in expected.parameters()]
    )


def test_leaves_stay_where_they_are():
    """CUDA graphs and compiled code hold on to the addresses."""
    bank = make()
    bank.refresh()
    addresses = [leaf.data_ptr() for site in bank._leaves.sites for leaf in site]
    train(bank, torch.optim.AdamW(bank.parameters(), lr=0.1), steps=3)
    bank.eval().delta(0, states())
    assert addresses == [leaf.data_ptr() for site in bank._leaves.sites for leaf in site]


@pytest.mark.parametrize("method", METHODS)
def test_leaves_are_contiguous(method):
    """Kernels hold on to that; orthonormal rows come out of a solve by columns."""
    bank = make(method)
    bank.refresh()
    tensors = [each for leaf in bank.leaves() for each in (leaf, leaf.grad)]
    assert tensors and all(tensor.is_contiguous() for tensor in tensors)


@pytest.mark.parametrize("method", METHODS)
def test_state_round_trip_is_bitwise(method):
    bank = make(method)
    train(bank, torch.optim.AdamW(bank.parameters(), lr=0.1), steps=3)
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    twin = make(method, init="paper")
    twin.eval().delta(0, states())  # caches rows that loading makes stale
    twin.load_state_dict(torch.load(file))
    for site in range(SITES):
        assert torch.equal(twin.delta(site, states()), bank.eval().delta(site, states()))


@pytest.mark.parametrize("method", METHODS)
def test_resumed_training_is_bitwise(method):
    def both(lr=0.05):
        bank = make(method)
        return bank, torch.optim.AdamW(bank.parameters(), lr=lr)

    straight, optimizer = both()
    train(straight, optimizer, steps=6)
    first, optimizer = both()
    train(first, optimizer, steps=4)
    second, resumed = both()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, steps=2, start=4)
    torch.testing.assert_close(dict(second.state_dict()), dict(straight.state_dict()), rtol=0, atol=0)


def test_a_state_of_another_shape_or_method_is_refused():
    with pytest.raises(RuntimeError, match=r"size mismatch for projection.*\[3, 4, 24\].*\[2, 4, 24\]"):
        make(sites=2).load_state_dict(make().state_dict())
    with pytest.raises(RuntimeError, match="source_weight"):
        make("loreft").load_state_dict(make("consreft").state_dict())


def test_load_with_assign():
    bank, other = make(), make("loreft", init="identity")
    bank.eval().delta(0, states())
    bank.load_state_dict(other.state_dict(), assign=True)
    assert bank.delta(0, states()).abs().max() == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(method, dtype):
    """The delta is float32 whatever the hidden states are; the gradient goes back in their type."""
    bank = make(method)
    bank.refresh()
    h = states(dtype=dtype).requires_grad_()
    delta = bank.delta(0, h)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta, bank.delta(0, h.float()))
    delta.sum().backward()
    assert h.grad.dtype == dtype
    assert bank.delta(0, h.double()).dtype == torch.float64


@pytest.mark.parametrize("method", METHODS)
def test_autocast_does_not_lower_the_precision(method):
    bank = make(method).eval()
    expected = bank.delta(0, states())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bank.delta(0, states()), expected)


def test_banks_are_not_cast_with_the_base_model():
    bank = make()
    for cast in (bank.half, bank.bfloat16, lambda: bank.to(torch.bfloat16)):
        with pytest.raises(TypeError, match="projection stays float32"):
            cast()
    assert bank.projection.dtype == torch.float32


def test_moving_recomputes():
    bank = make().eval()
    before = bank.delta(0, states())
    wide = bank.double().delta(0, states())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), before)


def test_copies_and_pickles():
    bank = make()
    bank.refresh()
    passes(bank, micro_batches=1)
    twin = copy.deepcopy(bank)
    assert torch.equal(twin.eval().delta(0, states()), bank.delta(0, states()))
    file = io.BytesIO()
    torch.save(bank, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).eval().delta(0, states()), bank.delta(0, states()))


def test_inference_mode_leaves_nothing_behind():
    """Rows that were first computed under inference mode must serve a training step afterwards."""
    bank = make().eval()
    with torch.inference_mode():
        bank.delta(0, states())
        assert not any(tensor.is_inference() for tensor in bank.fold().tensors())
    train(bank.train(), torch.optim.AdamW(bank.parameters()), steps=2)


def test_frozen_banks_cost_no_gradients():
    bank = make().requires_grad_(False)
    bank.refresh()
    h = states().requires_grad_()
    bank.delta(0, h).sum().backward()
    assert h.grad is not None
    assert not bank._leaves.pending and not bank.leaves()
    bank.backpropagate()


def test_an_empty_batch_of_rows():
    bank = make()
    bank.refresh()
    bank.delta(0, states(rows=0)).sum().backward()
    bank.backpropagate()
    assert (bank.source_bias.grad == 0).all()


def test_a_broken_frame_shows():
    bank = make().eval()
    with torch.no_grad():
        bank.projection[1, 2] = bank.projection[1, 0]
    assert bank.delta(1, states()).isnan().all()
    assert bank.delta(0, states()).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_compiles_in_one_piece(method):
    bank, plain = make(method), make(method)
    losses = []
    for each, delta in ((bank, torch.compile(bank.delta, fullgraph=True, backend="aot_eager")), (plain, plain.delta)):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.1)
        for step in range(3):
            each.refresh()
            loss = (states(seed=step) + delta(1, states(seed=step))).square().sum()
            loss.backward()
            each.backpropagate()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_checkpointing_recomputes_the_same():
    gradients = []
    for recompute in (False, True):
        bank = make()
        bank.refresh()
        h = states().requires_grad_()
        if recompute:
            delta = torch.utils.checkpoint.checkpoint(bank.delta, 0, h, use_reentrant=False)
        else:
            delta = bank.delta(0, h)
        delta.square().sum().backward()
        bank.backpropagate()
        gradients.append([h.grad, *(parameter.grad for parameter in bank.parameters())])
    torch.testing.assert_close(*gradients)


def test_dropout_on_the_delta():
    bank, h = make(dropout=0.5), states(rows=400)
    bank.refresh()
    torch.manual_seed(0)
    dropped, whole = bank.delta(0, h), bank.fold().delta(0, h)
    kept = dropped != 0
    assert 0.45 < kept.float().mean() < 0.55
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_on_the_output(dtype):
    """The whole edited state is dropped, the base's part of it too."""
    bank, h = make(dropout=0.5, dropout_on="output"), states(rows=400).to(dtype)
    bank.refresh()
    torch.manual_seed(0)
    edited, whole = h + bank.delta(0, h), h + bank.fold().delta(0, h)
    kept = edited.abs() > 1e-6
    assert 0.45 < kept.float().mean() < 0.55
    torch.testing.assert_close(edited[kept], 2 * whole[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout_on", ["delta", "output"])
def test_no_dropout_in_eval_mode(dropout_on):
    bank = make(dropout=0.5, dropout_on=dropout_on).eval()
    assert torch.equal(bank.delta(0, states()), make().eval().delta(0, states()))
