"""The bundled reviews are what their card says: sizes, balance, what training never sees, and who wrote them."""

import importlib.util
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from reft_cli.bundled import locate, names

SPLITS = {"train": 1200, "validation": 200, "test": 400, "hard": 200}
SCRIPT = Path(__file__).parents[2] / "scripts/make_reviews.py"


def load_script():
    spec = importlib.util.spec_from_file_location("make_reviews", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_reviews"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def read(split):
    return [json.loads(line) for line in locate(f"bundled:reviews/{split}").read_text(encoding="utf-8").splitlines()]


MAKER = load_script()
KNOWN, NEW = MAKER.vocabulary(MAKER.KNOWN), MAKER.vocabulary(MAKER.NEW)
REVIEWS = {split: read(split) for split in SPLITS}
TRAINED_FORMS = {row["form"] for row in REVIEWS["train"]}


def opinions(row):
    return set(re.findall(r"\w+", row["text"].lower())) & (KNOWN | NEW)


def words_of_training():
    used = defaultdict(set)
    for row in REVIEWS["train"]:
        used[row["family"]] |= opinions(row)
    return used


def test_the_splits_are_listed():
    assert set(names("data")) == {"bundled:reviews", *(f"bundled:reviews/{split}" for split in SPLITS)}


@pytest.mark.parametrize("split", SPLITS)
def test_sizes_and_columns(split):
    rows = REVIEWS[split]
    assert len(rows) == SPLITS[split]
    assert all(list(row) == ["text", "label", "domain", "family", "form"] for row in rows)
    assert Counter(row["domain"] for row in rows).keys() == {"film", "product", "restaurant"}


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_even_in_each_form(split):
    counts = Counter((row["form"], row["label"]) for row in REVIEWS[split])
    assert all(counts[form, "positive"] == counts[form, "negative"] for form, _ in counts)


def test_no_text_is_there_twice():
    texts = [row["text"].lower() for rows in REVIEWS.values() for row in rows]
    assert len(set(texts)) == len(texts) == sum(SPLITS.values())


def test_texts_are_whole_sentences():
    slip = re.compile(r"  | [.,]|[.!] [a-z]|\ba (?!useless)[aeiou]|\ban ([^aeiou]|useless)")
    for text in (row["text"] for rows in REVIEWS.values() for row in rows):
        assert re.fullmatch(r"[A-Z][A-Za-zé,;:.! -]+[.!]", text), text
        assert not slip.search(text), text


def test_every_row_has_an_opinion():
    assert all(opinions(row) for rows in REVIEWS.values() for row in rows)


def test_half_of_test_has_forms_that_training_lacks():
    assert sum(row["form"] not in TRAINED_FORMS for row in REVIEWS["test"]) == 200
    for split in ("validation", "hard"):
        assert {row["form"] for row in REVIEWS[split]} <= TRAINED_FORMS


def test_the_other_half_pairs_words_and_families_anew():
    used = words_of_training()
    for row in REVIEWS["test"]:
        if row["form"] in TRAINED_FORMS:
            assert not opinions(row) & used[row["family"]], row


def test_the_words_of_test_are_known_from_training():
    known = set().union(*words_of_training().values())
    assert all(opinions(row) <= known for row in REVIEWS["test"])


def test_hard_has_opinion_words_of_its_own():
    of_training = {word for row in REVIEWS["train"] for word in re.findall(r"\w+", row["text"].lower())}
    for row in REVIEWS["hard"]:
        assert opinions(row) <= NEW and not opinions(row) & of_training, row


def test_no_opinion_word_stands_on_both_sides():
    for pool in (MAKER.KNOWN, MAKER.NEW):
        sides = [{word for by_label in pool.values() for word in by_label[label]} for label in MAKER.LABELS]
        assert not sides[0] & sides[1]


def test_the_script_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_reviews.py", "--out", str(tmp_path)])
    MAKER.main()
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == locate(f"bundled:reviews/{split}").read_bytes(), split
