"""Answers in generated text: the published rules with their quirks, the repaired ones, and the user's own."""

from __future__ import annotations

import pytest

from reft_cli.evaluation.extraction import NAMED, Extraction, is_number, rule_of
from reft_cli.evaluation.metrics import by_source, score_texts
from reft_cli.suites import SUITES

# Text, then what `number` (as published) and `number_strict` find in it.
NUMBERS = [
    ("The answer is 42.", "42.", "42"),
    ("1,234 apples", "1234", "1,234"),
    ("first 3, then 4, so 7", "7", "7"),
    ("between 3,4", "34", "4"),  # published: every comma goes
    ("The answer is 12. That took 3 steps.", "3", "12"),  # published: the last number, whatever it counts
    ("so 10-5", "-5", "5"),  # published: a minus sign after a digit
    ("it is -5", "-5", "-5"),
    ("costs $1,200.50 in all", "1200.50", "1,200.50"),
    ("a share of .5", "5", ".5"),  # published: no number without a digit before its point
    ("#### 18", "18", "18"),
    ("the final answer is: 7 (of 9)", "9", "7"),
    ("none at all", "", ""),
    ("", "", ""),
]
# Text, then what `letter` (as published) and `letter_strict` find in it.
LETTERS = [
    ("The answer is (B).", "B", "B"),
    ("Adam has 3 apples. The answer is C", "A", "C"),  # published: the A of Adam
    ("By elimination, D is right: the answer is D.", "B", "D"),
    ("C", "C", "C"),
    ("A", "A", "A"),
    (" a) no", "", ""),
    ("Because of that, the option is (E)", "B", "E"),
    ("The result is option D.", "D", "D"),
    ("Answer: A", "A", "A"),
    ("so nothing fits", "", ""),
    ("", "", ""),
]


@pytest.mark.parametrize(("text", "published", "strict"), NUMBERS)
def test_numbers(text: str, published: str, strict: str):
    assert NAMED["number"].find(text, reference="1") == published
    assert NAMED["number_strict"].find(text, reference="1") == strict


@pytest.mark.parametrize(("text", "published", "strict"), LETTERS)
def test_letters(text: str, published: str, strict: str):
    assert NAMED["letter"].find(text, reference="A") == published
    assert NAMED["letter_strict"].find(text, reference="A") == strict


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic_strict"])
def test_arithmetic_looks_for_what_the_reference_is(name: str):
    text = "So the answer is C, for it is 12"
    assert NAMED[name].find(text, reference="B") == "C"
    assert NAMED[name].find(text, reference="18.0").startswith("12")


def test_what_counts_as_a_number():
    assert [is_number(text) for text in ("18.0", " 3 ", "-1e3", "B", "", "1/2")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


COMMONSENSE = rule_of(SUITES["commonsense"].values["task.extraction"])


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("the correct answer is true", True),
        ("the correct answer is  true \n", True),
        ("Well, the correct answer is true", True),
        ("the correct answer is true.", False),  # published: all that follows has to be the answer
        ("the correct answer is true the correct answer is false", False),
        ("The correct answer is true", False),
        ("true", False),  # published: without the words there is no answer
        ("the correct answer is", False),
        ("", False),
    ],
)
def test_commonsense_wants_its_words_and_nothing_after_the_answer(text: str, right: bool):
    assert COMMONSENSE is not None
    found = COMMONSENSE.find(text, reference="true")
    assert score_texts("exact_match", [found], ["true"]) == float(right)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("12.", "12.0", True),
        ("12.0005", "12", True),
        ("12.002", "12", False),
        ("", "0", False),
        ("B", "B", True),
        ("", "B", False),
    ],
)
def test_arithmetic_scores_numbers_within_a_thousandth_and_letters_as_text(answer: str, reference: str, right: bool):
    assert score_texts("numeric_match", [answer], [reference]) == float(right)


def test_rules_of_the_user():
    assert rule_of(None) is None
    assert rule_of({"after": "A:"}) == Extraction(after="A:")
    rule = rule_of({"pattern": r"\((\w)\)", "take": "last", "ignore_case": False, "remove": [" "]})
    assert rule is not None
    assert rule.find("(a) or ( b )", reference="") == "b"
    assert rule.find("neither", reference="") == ""
    yes = Extraction(pattern="yes|no", ignore_case=True)
    assert yes.find("NO, yes") == "NO"
    assert Extraction(pattern=r"x(y)?").find("x") == "x"
    assert Extraction(after=":", pattern=r"\w+").find("a: b: c") == "b"
    assert Extraction(after=":", remove=("!",)).find("a: b : c!\n") == "b : c"


def test_scores_of_several_sources_are_their_plain_mean():
    hits = [1, 1, 1, 0]

    def share(rows: list[int]) -> float:
        return sum(hits[row] for row in rows) / len(rows)

    assert by_source("f1", ["a", "a", "a", "b"], share) == {"f1": 0.5, "f1/a": 1.0, "f1/b": 0.0}
    assert by_source("f1", ["a", "a", "a", "a"], share) == {"f1": 0.75}
