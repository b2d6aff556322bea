"""Log-probabilities of answers: those of a plain softmax, with its gradients, however they are cut into chunks."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from reft_cli.data.batch import build_batch
from reft_cli.data.examples import Example
from reft_cli.models.build import build_intervened
from reft_cli.positions import Positions
from reft_cli.tasks import likelihood
from reft_cli.tasks.objectives import CausalLM, predict
from tiny_models import base_of

EXAMPLES = [Example(list(range(2, 14)), 5, None, "", "", 1), Example([7, 9, 11, 200], 2, None, "", "", 2)]
POSITIONS = Positions.parse("f2+l1")


def built(family, base=None):
    return build_intervened(
        base or base_of(family),
        method="loreft",
        layers="all",
        component="block_output",
        positions=POSITIONS,
        tied=True,
        rank=2,
        init="paper",
        dropout=0.0,
        dropout_on="delta",
        seed=0,
    )


def batch_of(layout="padded"):
    return build_batch(EXAMPLES, groups=POSITIONS.groups(tied=True), layout=layout, pad_token_id=1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])  # gemma2 caps its logits: no linear head
@pytest.mark.parametrize("chunk", [300, 2**27])
def test_values_and_gradients_are_those_of_a_plain_softmax(family, chunk, monkeypatch):
    monkeypatch.setattr(likelihood, "CHUNK", chunk)  # one row at a time, or all at once
    model, batch = built(family), batch_of()
    weights = torch.linspace(-1, 1, len(batch.targets))

    def slopes_of(log_probabilities):
        model.bank.zero_grad()
        model.bank.refresh()
        found = log_probabilities()
        (found * weights).sum().backward()
        model.bank.backpropagate()
        return found, {name: p.grad.clone() for name, p in model.bank.named_parameters()}

    def plainly():
        table = model.base_model(**batch.inputs).logits.flatten(0, 1)[batch.answer_rows].log_softmax(-1)
        return table[torch.arange(len(batch.targets)), batch.targets]

    with model, model.editing(batch.rows):
        found, slopes = slopes_of(lambda: likelihood.log_probabilities(model, batch))
        wanted, theirs = slopes_of(plainly)
        model.bank.refresh()
        chosen, greedy = likelihood.likelihoods(model, batch)
        best = model.base_model(**batch.inputs).logits.flatten(0, 1)[batch.answer_rows].argmax(-1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(chosen, found.detach())
    assert greedy.tolist() == (best == batch.targets).tolist()
    for name, slope in slopes.items():
        torch.testing.assert_close(slope, theirs[name], atol=1e-5, rtol=1e-4)
        assert slope.abs().max() > 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2", "roberta"])
def test_what_is_made_of_a_half_model_s_logits_is_float32(family):
    """Bits that bfloat16 has not: of the log-probabilities, the loss and, for an encoder, the head's numbers."""
    base, batch = base_of(family), batch_of()
    model = built(family, replace(base, model=deepcopy(base.model).bfloat16())).eval()
    with torch.no_grad(), model, model.editing(batch.rows):
        logits = model.base_model(**batch.inputs).logits.float()
        if family == "roberta":
            torch.testing.assert_close(predict(model, batch), logits)
            return
        table = logits.flatten(0, 1)[batch.answer_rows].log_softmax(-1)
        wanted = table[torch.arange(len(batch.targets)), batch.targets]
        torch.testing.assert_close(likelihood.log_probabilities(model, batch), wanted, atol=1e-3, rtol=0)
        torch.testing.assert_close(CausalLM().loss(model, batch), -wanted.sum(), atol=5e-3, rtol=0)
