"""The data report of `reft check`, and one row with its marks."""

import json

import pytest

from reft_cli.data.encode import Counts, Encoded, Example, Notice
from reft_cli.data.report import Lengths, render_row, report
from reft_cli.positions import Positions
from small_tokenizers import KINDS, byte_level


def example(row, prompt, answer, label=None):
    return Example(list(range(prompt + answer)), prompt, label, "", "", row)


def encoded(examples, **given):
    counts = {"read": len(examples), "used": len(examples)} | given.pop("counts", {})
    return Encoded("train.jsonl", examples, Counts(**counts), **given)


def test_lengths_are_nearest_rank_percentiles():
    found = report(encoded([example(n, n, 2) for n in range(1, 101)]), positions=Positions.parse("f1"))
    assert found.prompt == Lengths(50, 95, 100)
    assert found.answer == Lengths(2, 2, 2)
    assert found.total == Lengths(52, 97, 102)
    assert found.tokens == 5050 + 200
    assert report(encoded([example(1, 4, 1)]), positions=Positions.parse("f1")).prompt == Lengths(4, 4, 4)


def test_prompts_shorter_than_the_positions_are_counted():
    examples = [example(1, 14, 1), example(2, 13, 1), example(3, 2, 1)]
    found = report(encoded(examples), positions=Positions.parse("f7+l7"))
    assert (found.whole_prompt, found.short) == (14, Notice(2, 2))
    assert report(encoded(examples), positions=Positions.parse("all")).short == Notice(0, None)


def test_labels_are_counted_by_name():
    found = report(
        encoded([example(1, 5, 0, 1), example(2, 5, 0, 1), example(3, 5, 0, 0)], classes=("bad", "good", "odd")),
        positions=Positions.parse("f1"),
    )
    assert found.labels == {"bad": 1, "good": 2, "odd": 0}


def test_every_warning_is_a_sentence():
    counts = {
        "read": 8192,
        "dropped": Notice(37, 12),
        "cut": Notice(1, 5),
        "spanning": Notice(3, 2),
        "differing": Notice(4, 9),
    }
    found = report(encoded([example(4, 9, 1)], counts=counts), positions=Positions.parse("f7+l7"))
    assert found.warnings == [
        "train.jsonl: 37 of 8,192 rows dropped as too long (first: row 12)",
        "train.jsonl: 1 of 8,192 rows cut as too long (first: row 5)",
        "train.jsonl: 3 of 8,192 rows with a token that spans prompt and answer: end the prompt without a trailing "
        "space and start the answer with one (first: row 2)",
        "train.jsonl: 4 of 8,192 rows with other prompt tokens than the same prompt has without its answer "
        "(first: row 9)",
        "train.jsonl: 1 of 8,192 rows with a prompt of fewer than 14 tokens for f7+l7 (first: row 4)",
    ]


def test_scored_rows_that_are_learned_from_are_counted():
    """A test file that is the training file, in whole or in part, gave a good score and no warning."""
    texts = [("a", "b"), ("a", "c"), ("ab", ""), ("", "ab"), ("a", "b")]
    rows = [Example([1, 2], 1, None, prompt, answer, row) for row, (prompt, answer) in enumerate(texts, start=1)]
    found = report(encoded(rows), positions=Positions.parse("f1"), training=encoded([rows[0], rows[3]]))
    assert found.learned == Notice(3, 1)
    assert found.warnings == ["train.jsonl: 3 of 5 rows stand among the training rows too (first: row 1)"]
    assert report(encoded(rows), positions=Positions.parse("f1")).learned == Notice()


def test_good_data_have_no_warnings():
    assert report(encoded([example(1, 14, 1)]), positions=Positions.parse("f7+l7")).warnings == []


def test_a_report_is_plain_values():
    found = report(encoded([example(1, 3, 1)]), positions=Positions.parse("f7+l7")).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["counts"]["used"] == 1 and found["prompt"]["p95"] == 3 and len(found["warnings"]) == 1


def rendered(text, prompt, positions, *, tied=True, tokenizer=None):
    tokenizer = tokenizer or byte_level()
    row = Example(tokenizer(text)["input_ids"], prompt, None, "", "", 1)
    return render_row(row, tokenizer=tokenizer, groups=Positions.parse(positions).groups(tied=tied))


def test_a_row_is_marked_token_by_token():
    tokens = rendered("The film was good", 3, "f1+l1", tied=False)
    assert [token.text for token in tokens][:3] == ["The", " film", " was"]
    assert [token.is_prompt for token in tokens][:4] == [True, True, True, False]
    assert [token.groups for token in tokens][:4] == [("f1",), (), ("l1",), ()]
    assert all(token.is_prompt != token.is_answer for token in tokens)
    assert all(token.groups == ("all",) for token in rendered("The film", 1, "all"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_of_the_tokens_are_the_text(kind):
    tokenizer = KINDS[kind]()
    text = "the film was 日本 🙂 good"
    ids = tokenizer(text)["input_ids"]
    tokens = rendered(text, 2, "f1", tokenizer=tokenizer)
    assert len(tokens) == len(ids)
    assert "".join(token.text for token in tokens) == tokenizer.decode(ids)


def test_a_character_of_several_tokens_stands_at_its_last():
    texts = [token.text for token in rendered("a🙃", 1, "f1", tokenizer=byte_level())]
    assert texts[0] == "a" and texts[-1] == "🙃" and set(texts[1:-1]) <= {""}
    broken = Example(byte_level()("a🙃")["input_ids"][:2], 1, None, "", "", 1)
    assert render_row(broken, tokenizer=byte_level(), groups=())[-1].text == "\N{REPLACEMENT CHARACTER}"
