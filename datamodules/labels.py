"""Labels as stored in files, text or numbers -> class numbers or real values, and the names of the classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from datamodules.errors import DataError, check_known, printable

Array = np.ndarray[Any, Any]
Cells = Sequence[Any] | Array  # the cells of a column
At = Callable[[int], str]  # index -> the row's name in messages, e.g. "target: wine.csv row 3"


def are_values(labels: Iterable[Any], kind: str | None, classes: Sequence[str] | None) -> bool:
    """Returns whether labels are real values: by `kind`, or, without it and `classes`, by a decimal point."""
    if kind is None:
        return classes is None and any(isinstance(label, float) for label in labels)
    return kind == "values"


def gather_classes(labels: Mapping[str, Cells], what: str, same: bool = True) -> list[str]:
    """Gathers the names of the classes, numbers in numeric and text in alphabetical order.

    Args:
        labels: The labels of each domain.
        what: What messages call the samples, e.g. "texts".
        same: Whether all domains must have the same classes.

    Raises:
        DataError: The domains' classes differ, or there is only one class.
    """
    found = {name: set(map(class_name, _distinct(own)[0])) for name, own in labels.items()}
    if same:
        check_same_classes(found)
    every = set().union(*found.values())
    if len(every) < 2:
        raise DataError(
            f"label: all {what} have the label {', '.join(every)}; classification needs at least two classes"
        )
    numeric = all(math.isfinite(as_number(name)) for name in every)
    return sorted(every, key=lambda name: (as_number(name) if numeric else 0.0, name))


def check_same_classes(found: Mapping[str, Collection[str]]) -> None:
    """Rejects domains whose classes differ, and class names that config.yaml cannot hold.

    Raises:
        DataError: The classes differ, or a name is not UTF-8.
    """
    for name, classes in found.items():
        for label in classes:
            if printable(label) != label:
                raise DataError(
                    f"{name}: the name of the class {printable(label)} is not UTF-8; rename its folder or files"
                )
    only: dict[str, list[str]] = {}
    for label in sorted(set().union(*found.values())):
        owners = [name for name, classes in found.items() if label in classes]
        if len(owners) < len(found):
            only.setdefault(f"{' and '.join(owners)} {'has' if len(owners) == 1 else 'have'}", []).append(label)
    if only:
        parts = "; ".join(f"only the {owners} {', '.join(labels[:5])}" for owners, labels in sorted(only.items()))
        raise DataError(f"{', '.join(found)}: their classes differ: {parts}")


def encode_labels(labels: Cells, class_names: Sequence[str] | None, at: At) -> Array:
    """Encodes N labels as their numbers in `class_names`, (N,) int64, or, if that is None, as (N,) float32.

    Raises:
        DataError: A label is missing, not one of the classes, or, without classes, not a number.
    """
    if class_names is None:
        return read_numbers(labels, at, "label").astype(np.float32)
    check_present(labels, at, "label")
    number = {class_name(name): position for position, name in enumerate(class_names)}
    distinct, inverse = _distinct(labels)
    for name in map(class_name, distinct):
        check_known("classes", name, number, "class")
    return np.array([number[class_name(cell)] for cell in distinct], np.int64)[inverse]


def _distinct(cells: Cells) -> tuple[list[Any], Array]:
    """Returns the distinct values of N cells, and each cell's index among them, (N,)."""
    if isinstance(cells, np.ndarray):
        values, inverse = np.unique(cells, return_inverse=True)
        return values.tolist(), inverse
    number = {value: position for position, value in enumerate(dict.fromkeys(cells))}
    return list(number), np.array([number[cell] for cell in cells], np.int64)


def read_numbers(cells: Cells, at: At, what: str) -> Array:
    """Converts the cells of a column to finite numbers, (N,) float64.

    Raises:
        DataError: A cell is not a number.
    """
    check_present(cells, at, what)
    typed = isinstance(cells, np.ndarray) and cells.dtype.kind in "iuf"
    numbers = np.asarray(cells if typed else [as_number(cell) for cell in cells], np.float64)
    for row in np.flatnonzero(~np.isfinite(numbers))[:1].tolist():
        advice = ", or pass --data.kind classes" if what == "label" else ""
        raise DataError(f"{at(row)}: its {what} '{cells[row]}' is not a number; fix it{advice}")
    return numbers


def read_weights(cells: Cells, at: At) -> list[float]:
    """Reads how much the loss of each sample counts.

    Raises:
        DataError: A weight is missing, not a number or negative, or all are 0.
    """
    weights: list[float] = read_numbers(cells, at, "weight").tolist()
    for row, weight in enumerate(weights):
        if weight < 0:
            raise DataError(f"{at(row)}: its weight {weight:g} is negative; fix it")
    if not any(weights):
        raise DataError(f"{at(0)}: all weights are 0; fix them, or leave --data.weight out")
    return weights


def check_present(cells: Cells, at: At, what: str) -> None:
    """Rejects a column with a missing cell: None, nan or empty text.

    Raises:
        DataError: A cell is missing.
    """
    if isinstance(cells, np.ndarray) and cells.dtype.kind != "O":
        absent = np.flatnonzero(cells == "" if cells.dtype.kind == "U" else cells != cells).tolist()
    else:
        absent = [row for row, cell in enumerate(cells) if cell is None or cell == "" or cell != cell]
    if absent:
        raise DataError(f"{at(absent[0])}: its {what} is missing; fill it in or remove the row")


def class_name(label: Any) -> str:
    """Converts a label to text, a whole number without a decimal point."""
    number = as_number(label)
    return str(int(number)) if number.is_integer() and str(number) == str(label) else str(label)


def as_number(cell: Any) -> float:
    """Converts a cell to a number, nan if it is not one."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan
