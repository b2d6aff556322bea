"""Each method against its formula, and the identities that the paper's maths promises."""

import pytest
import torch

from reft_cli.errors import SpecError
from reft_cli.interventions import METHODS, FoldedDiagonal, build_bank
from reft_cli.spec.schema import InterventionSpec

SITES, WIDTH, RANK = 3, 24, 4
ORTHOGONAL = ["loreft", "direft_orthogonal", "consreft", "lobireft"]
FORMULAS = {  # on rows: h [N, d], R and W [r, d]
    "loreft": lambda h, R, W, b: (h @ W.T + b - h @ R.T) @ R,
    "noreft": lambda h, R, W, b: (h @ W.T + b - h @ R.T) @ R,
    "direft": lambda h, R, W, b: (h @ W.T + b) @ R,
    "direft_orthogonal": lambda h, R, W, b: (h @ W.T + b) @ R,
    "consreft": lambda h, R, W, b: (b - h @ R.T) @ R,
    "lobireft": lambda h, R, W, b: (b @ R).expand_as(h),
}


def make(method, *, sites=SITES, width=WIDTH, rank=RANK, init="paper", dropout=0.0, dropout_on="delta", seed=0):
    return build_bank(
        method,
        sites=sites,
        width=width,
        rank=None if method == "red" else rank,
        init=init,
        dropout=dropout,
        dropout_on=dropout_on,
        generator=torch.Generator().manual_seed(seed),
    )


def disturbed(method):
    """A bank in float64, away from its start."""
    bank = make(method).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return bank.eval()


def states(*, rows=6, width=WIDTH, dtype=torch.float64):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(2), dtype=dtype)


def test_the_spec_and_the_table_name_the_same_methods():
    assert set(METHODS) == set(InterventionSpec.model_fields["method"].annotation.__args__)
    assert all(bank.method == name for name, bank in METHODS.items())


@pytest.mark.parametrize("method", FORMULAS)
@pytest.mark.parametrize("site", range(SITES))
def test_formula(method, site):
    bank, h = disturbed(method), states()
    weight = bank.source_weight[site] if bank.has_weight else None
    expected = FORMULAS[method](h, bank.rows()[site], weight, bank.source_bias[site])
    torch.testing.assert_close(bank.delta(site, h), expected)


def test_red_scales_and_shifts_as_its_authors_do():
    """The authors' ActivationLayer (mlwu22/RED): `x * activation_scaling + activation_bias`."""
    bank, h = disturbed("red"), states()
    for site in range(SITES):
        torch.testing.assert_close(h + bank.delta(site, h), h * bank.scale[site] + bank.bias[site])


@pytest.mark.parametrize("method", METHODS)
def test_folded_is_the_delta(method):
    bank, h = disturbed(method), states()
    folded = bank.fold()
    for site in range(SITES):
        torch.testing.assert_close(folded.delta(site, h), bank.delta(site, h), rtol=0, atol=0)
    if isinstance(folded, FoldedDiagonal):
        torch.testing.assert_close(bank.delta(1, h), folded.scale[1] * h + folded.bias[1])
    else:
        expected = (h @ folded.down[1].T + folded.bias[1]) @ folded.up[1]
        torch.testing.assert_close(bank.delta(1, h), expected)


@pytest.mark.parametrize("method", METHODS)
def test_folding_gives_a_copy(method):
    bank = make(method)
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    for tensor in bank.fold().tensors():
        assert not tensor.requires_grad
        tensor.fill_(7)
    torch.testing.assert_close(dict(bank.state_dict()), before)


@pytest.mark.parametrize("method", ["loreft", "noreft"])
def test_w_equal_to_r_and_no_bias_is_the_identity(method):
    bank, h = disturbed(method), states()
    with torch.no_grad():
        bank.source_weight.copy_(bank.rows())
        bank.source_bias.zero_()
    torch.testing.assert_close(bank.delta(0, h), torch.zeros_like(h), rtol=0, atol=1e-13)


def test_loreft_writes_the_source_into_its_subspace():
    """R(h + delta) = Wh + b."""
    bank, h = disturbed("loreft"), states()
    after = (h + bank.delta(0, h)) @ bank.rows()[0].T
    torch.testing.assert_close(after, h @ bank.source_weight[0].T + bank.source_bias[0])


@pytest.mark.parametrize("method", ORTHOGONAL)
def test_only_the_subspace_changes(method):
    bank, h = disturbed(method), states()
    R, delta = bank.rows()[0], bank.delta(0, h)
    torch.testing.assert_close(delta @ R.T @ R, delta)


def test_consreft_twice_is_consreft_once():
    bank, h = disturbed("consreft"), states()
    once = h + bank.delta(0, h)
    torch.testing.assert_close(once + bank.delta(0, once), once)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"consreft"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_start_is_exact(method, dtype):
    bank = make(method, init="identity", width=512).eval()
    h = 100 * states(width=512, dtype=torch.float32)
    for site in range(SITES):
        assert bank.delta(site, h.to(dtype)).abs().max() == 0


def test_identity_start_of_loreft_can_leave():
    """At the start R and W have gradients, so that training moves."""
    bank = make("loreft", init="identity")
    bank.refresh()
    bank.delta(0, states(dtype=torch.float32)).sum().backward()
    bank.backpropagate()
    assert bank.source_weight.grad[0].abs().max() > 0
    assert bank.source_bias.grad[0].abs().max() > 0


def test_consreft_has_no_identity():
    with pytest.raises(ValueError, match="consreft"):
        make("consreft", init="identity")


@pytest.mark.parametrize("method", METHODS)
def test_paper_start(method):
    """nn.Linear's range for W, b and W₂; random frames; U(0, 1) for a bias without W; RED at the identity."""
    bank, bound = make(method, width=400), 400**-0.5
    if method == "red":
        assert (bank.scale == 1).all()
        assert (bank.bias == 0).all()
        return
    uniform = [] if method in ORTHOGONAL else [bank.projection]
    uniform += [bank.source_weight] if bank.has_weight else []
    for tensor in uniform:
        assert bound * 0.98 < tensor.abs().max() <= bound
        assert abs(tensor.std().item() / (bound / 3**0.5) - 1) < 0.05
    bias = bank.source_bias.detach()
    assert (bias.abs() <= bound).all() if bank.has_weight else ((bias >= 0) & (bias < 1)).all()
    assert bias.unique().numel() == bias.numel()
    if method in ORTHOGONAL:
        assert abs(bank.projection.norm(dim=-1).mean().item() - 0.5) < 0.02


def test_frame_moves_twice_as_far_as_its_weight():
    """As pyreft's parametrization does at its start; that is what published learning rates assume."""
    bank = make("loreft", width=4096)
    before = bank.rows()
    step = torch.randn(bank.projection.shape, generator=torch.Generator().manual_seed(3))
    step = 1e-3 * (step - (step @ before.mT) @ before)  # across the frame
    with torch.no_grad():
        bank.projection += step
    assert abs(((bank.rows() - before).norm() / step.norm()).item() - 2) < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_is_a_start(method):
    states_of = [make(method, seed=seed).state_dict() for seed in (5, 5, 6)]
    torch.testing.assert_close(states_of[0], states_of[1], rtol=0, atol=0)
    if method != "red":
        assert all((states_of[0][name] != states_of[2][name]).any() for name in states_of[0])


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    make("loreft")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("method", METHODS)
def test_state(method):
    bank = make(method)
    assert all(tensor.dtype == torch.float32 and len(tensor) == SITES for tensor in bank.state_dict().values())
    assert set(bank.state_dict()) == dict(bank.named_parameters()).keys()
    assert set(bank.state_dict()) >= bank.undecayed


@pytest.mark.parametrize(
    ("method", "sites", "width", "rank", "count"),
    [
        ("loreft", 1, 4096, 4, 32_772),  # the README's example
        ("loreft", 32, 4096, 8, 2_097_408),  # commonsense, 7B, all layers tied
        ("loreft", 8, 4096, 4, 262_176),  # instruction tuning: four layers, untied
        ("loreft", 12, 768, 1, 18_444),  # GLUE, RoBERTa-base
        ("loreft", 24, 1024, 1, 49_176),  # GLUE, RoBERTa-large
        ("consreft", 1, 4096, 1, 4_097),  # memorisation
        ("red", 32, 4096, None, 262_144),  # 2 d L
    ],
)
def test_published_counts(method, sites, width, rank, count):
    with torch.device("meta"):
        bank = METHODS[method](sites=sites, width=width, rank=rank)
    assert sum(parameter.numel() for parameter in bank.parameters()) == count


def test_undecayed():
    """Orthonormal rows, biases and RED are never decayed; free matrices may be."""
    decayed = {name: {*make(name).state_dict()} - bank.undecayed for name, bank in METHODS.items()}
    assert decayed == {
        "loreft": {"source_weight"},
        "noreft": {"source_weight", "projection"},
        "direft": {"source_weight", "projection"},
        "direft_orthogonal": {"source_weight"},
        "consreft": set(),
        "lobireft": set(),
        "red": set(),
    }


def test_a_rank_that_does_not_fit():
    assert make("loreft", rank=24).rank == 24
    with pytest.raises(SpecError, match="25 is more than the 24 dimensions"):
        make("loreft", rank=25)
    with pytest.raises(SpecError, match="loreft needs one"):
        make("loreft", rank=None)
