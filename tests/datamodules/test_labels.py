import math

import pytest

from datamodules import DataError
from datamodules.labels import are_values, check_same_classes, class_name, encode_labels, gather_classes


def at(row):
    return f"t.csv row {row}"


@pytest.mark.parametrize(("label", "name"), [
    (3, "3"), (3.0, "3"), ("3.0", "3"), (2.5, "2.5"), ("007", "007"), ("1e3", "1e3"), (True, "True"), ("x", "x"),
    (math.inf, "inf"),
])  # fmt: skip
def test_a_whole_number_is_named_without_a_point(label, name):
    assert class_name(label) == name


def test_classes_are_in_the_order_of_numbers_or_of_the_alphabet():
    assert gather_classes({"source": [10, 9.0], "target": ["9", "10"]}, "rows") == ["9", "10"]
    assert gather_classes({"target": ["b", "10", "9"]}, "rows") == ["10", "9", "b"]
    assert gather_classes({"source": ["a"], "target": ["b"]}, "rows", same=False) == ["a", "b"]


def test_domains_with_other_classes_are_named():
    with pytest.raises(DataError, match=r"s/a, s/b, target: .*: only the s/a and s/b have x; only the target has y"):
        check_same_classes({"s/a": {"x", "z"}, "s/b": {"x", "z"}, "target": {"y", "z"}})


def test_numbers_with_a_point_are_values_unless_something_is_said():
    assert are_values([1, 2.5], None, None)
    assert not are_values([1, 2], None, None)
    assert not are_values([1.5], None, ["1.5", "2"])
    assert are_values(["x"], "values", ["x"])


def test_labels_become_numbers_of_classes_or_values():
    assert encode_labels([2.0, "1", 2], ["1.0", "2"], at).tolist() == [1, 0, 1]
    assert encode_labels(["0.5", 2], None, at).tolist() == [0.5, 2.0]
    for missing in (None, "", math.nan):
        with pytest.raises(DataError, match=r"t\.csv row 1: its label is missing; fill it in"):
            encode_labels(["a", missing], ["a", "b"], at)
    with pytest.raises(DataError, match=r"t\.csv row 1: its label 'inf' is not a number; fix it, or pass --data\.kind"):
        encode_labels(["1", "inf"], None, at)
    with pytest.raises(DataError, match=r"classes: there is no class c; there are a, b"):
        encode_labels(["a", "c"], ["a", "b"], at)
