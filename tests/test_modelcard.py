"""The card of a run: what the hub reads, and what is left out when it is not known."""

import yaml

from reft_cli.modelcard import render


def card(**changes):
    facts = {
        "name": "runs/x",
        "record": {"status": "done", "trainable": 2000, "base": {"parameters": 1_000_000, "commit": "4e20de36"}},
        "spec": {"model": {"name": "org/model"}, "intervention": {"method": "red", "rank": None}},
        "validation": (40, {"accuracy": 0.875}),
        "evaluations": {"test": {"metrics": {"accuracy": 0.81, "note": "text"}}},
        "spec_text": "model: org/model\n",
    }
    return render(**(facts | changes))


def front_matter(text):
    return yaml.safe_load(text.split("---")[1])


def test_facts_and_scores():
    text = card()
    for line in (
        "| Base model, frozen | `org/model` at `4e20de36` |",
        "| Method | red |",
        "| Trained parameters | 2,000 (0.200% of 1,000,000) |",
        "| validation, step 40 | accuracy | 0.875 |",
        "| test | accuracy | 0.81 |",
    ):
        assert line in text
    assert "Rank" not in text and "note" not in text


def test_only_a_model_of_the_hub_is_a_base_model():
    assert front_matter(card())["base_model"] == "org/model"
    assert "base_model" not in front_matter(card(record={"base": {"commit": None}}))


def test_an_empty_record_is_a_card_too():
    text = card(record={}, validation=None, evaluations={})
    assert "## Scores" not in text and front_matter(text)["library_name"] == "reft"
