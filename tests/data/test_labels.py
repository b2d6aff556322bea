"""Labels of every type that files hold."""

import pytest

from reft_cli.data.labels import class_name, class_number, find_classes, number
from reft_cli.errors import DataError


def error_of(action, *arguments, **given):
    with pytest.raises(DataError) as caught:
        action(*arguments, **given)
    return str(caught.value)


def find(*values):
    return find_classes(values, places=[f"a.csv:{line}" for line in range(2, 2 + len(values))], name="a.csv")


def test_names_of_classes():
    assert [class_name(value, where="x") for value in ("good", 3, 3.0, True, False, "7")] == [
        "good",
        "3",
        "3",
        "true",
        "false",
        "7",
    ]


def test_classes_are_sorted_and_numbers_by_size():
    assert find("b", "a", "b") == ("a", "b")
    assert find(10, 9, -1) == ("-1", "9", "10")
    assert find("10", "9") == ("9", "10")
    assert find("10", "9", "x") == ("10", "9", "x")
    assert find(True, False) == ("false", "true")


def test_wrong_labels():
    between = "is a number between classes; for numbers write task.kind: regression"
    assert error_of(find, "a", 4.2) == f"a.csv:3: label 4.2 {between}"
    assert error_of(find, "a", float("nan")) == f"a.csv:3: label nan {between}"
    assert error_of(find, "a", "") == "a.csv:3: a label is a text or a whole number, this is ''"
    assert error_of(find, None) == "a.csv:2: a label is a text or a whole number, this is None"
    assert error_of(find, "a", "a") == ("a.csv: all labels are `a`; a classification needs two classes or more")


def test_numbers_of_classes():
    names = ("bad", "good")
    assert class_number("good", names, where="x", given=False) == 1
    assert [class_number(value, names, where="x", given=True) for value in (0, "1", True, 1.0)] == [0, 1, 1, 1]
    assert class_number(1, ("1", "0"), where="x", given=True) == 0  # a name comes before a number
    assert error_of(class_number, 2, names, where="a.csv:5", given=True) == (
        "a.csv:5: label `2` is not a class of task.labels (bad, good)"
    )
    assert error_of(class_number, 1, names, where="a.csv:5", given=False) == (
        "a.csv:5: label `1` is not a class of the training data (bad, good)"
    )
    many = tuple(map(str, range(77)))
    assert error_of(class_number, "x", many, where="a.csv:5", given=False).endswith(
        "(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, …)"
    )


def test_numbers_of_a_regression():
    assert [number(value, where="x") for value in (1, 2.5, "3.5", " 4 ", "1e-3")] == [1.0, 2.5, 3.5, 4.0, 0.001]


@pytest.mark.parametrize("value", ["", "x", None, True, [1], float("inf"), "nan", float("nan")])
def test_what_is_no_number(value):
    assert error_of(number, value, where="a.csv:5") == (
        f"a.csv:5: label {value!r} is not a finite number, as task.kind regression needs"
    )
