"""Did you mean …?"""

from __future__ import annotations

import pytest

from reft_cli.spec.base import Section
from reft_cli.spec.fields import branches_of, in_words, keys_in, known_keys
from reft_cli.spec.names import OTHER_NAMES, REMARKS, WITHOUT_OURS, nearest_keys, remark_on
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
        ("data.eval", "data.validation"),
        ("model.name_or_path", "model.name"),
        ("evaluation.steps", "evaluation.every"),
        ("evaluation.batch_size", "train.global_batch_size"),
        ("generation.max_length", "generation.max_new_tokens"),
        ("max_length", "data.max_length"),
        ("generation.do_sample", "generation.temperature"),
        ("model.load_in_4bit", "model.quantization"),
        ("val_set_size", "data.validation"),
        ("lora_rank", "intervention.rank"),
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
            section, _, last = key.rpartition(".")
            assert last == name or f"{section}.{name}".lstrip(".") not in known_keys()


def test_what_others_have_and_nothing_here_means():
    assert nearest_keys(("train", "optim")) == () and "AdamW" in str(remark_on(("train", "optim")))
    assert remark_on(("train", "warmup_steps")) == "a share of the steps"
    assert remark_on(("train", "lr")) is None
    assert not {*WITHOUT_OURS} & {*OTHER_NAMES} and {*REMARKS} <= {*OTHER_NAMES}
    assert not {*WITHOUT_OURS} & {key.rpartition(".")[2] for key in known_keys()}


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
