"""Did you mean …?"""

from __future__ import annotations

import pytest

from reft_cli.spec.base import Section
from reft_cli.spec.fields import branches_of, in_words, keys_in, known_keys
from reft_cli.spec.names import OTHER_NAMES, nearest_keys
from reft_cli.spec.schema import Spec


def sections(section=Spec):
    yield section
    for field in section.model_fields.values():
        for branch in branches_of(field):
            if branch.section:
                yield from sections(branch.section)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("learning_rate", "train.learning_rate"),
        ("train.lr", "train.learning_rate"),
        ("lr", "train.learning_rate"),
        ("intervention.type", "intervention.method"),
        ("task.type", "task.kind"),
        ("batch_size", "train.global_batch_size"),
        ("train.batch_size", "train.global_batch_size"),
        ("generation.batchsize", "generation.batch_size"),
        ("intervention.share_weights", "intervention.tied"),
        ("intervention.low_rank_dimension", "intervention.rank"),
        ("intervention.position", "intervention.positions"),
        ("intervention.layer", "intervention.layers"),
        ("train.epoch", "train.epochs"),
        ("train.learning-rate", "train.learning_rate"),
        ("train.LearningRate", "train.learning_rate"),
        ("train.maxSteps", "train.max_steps"),
        ("train.dropout", "model.dropout"),
        ("data.train.file", "data.train"),
        ("interventon", "intervention"),
        ("eval", "evaluation"),
        ("dataset", "data"),
        ("train.report_to", "log"),
        ("data.train.spilt", "data.train.split"),
    ],
)
def test_nearest(given, meant):
    assert nearest_keys(tuple(given.split(".")))[0] == meant


def test_nothing_near():
    assert nearest_keys(("foobarbaz",)) == ()


def test_other_names_are_not_ours_and_lead_to_keys_that_exist():
    for name, keys in OTHER_NAMES.items():
        assert set(keys) <= set(known_keys()), name
        for key in keys:
            section = key.rpartition(".")[0]
            assert f"{section}.{name}".lstrip(".") not in known_keys()


def test_known_keys():
    keys = known_keys()
    assert {"model", "model.name", "train.seed", "data.train.split", "data.template.prompt", "extends"} <= set(keys)
    assert len(keys) == len(set(keys))
    assert keys_in(()) == tuple(Spec.model_fields)
    assert keys_in(("data", "columns")) == ()


def test_every_field_has_words_and_help():
    for section in sections():
        assert issubclass(section, Section)
        for name, field in section.model_fields.items():
            assert in_words(branches_of(field)), name
            assert field.description, name
