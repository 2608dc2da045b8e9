"""Labels as files hold them, text or numbers -> class numbers or real values, and the names of the classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from datamodules.errors import DataError, check_known, printable

Array = np.ndarray[Any, Any]
Cells = Sequence[Any] | Array  # of a column
At = Callable[[int], str]  # what messages call a row, e.g. "target: wine.csv row 3"


def are_values(labels: Iterable[Any], kind: str | None, classes: Sequence[str] | None) -> bool:
    """Whether labels are real values: `kind` says so, or, without it and without `classes`, a number has a point."""
    if kind is None:
        return classes is None and any(isinstance(label, float) for label in labels)
    return kind == "values"


def gather_classes(labels: Mapping[str, Cells], what: str, same: bool = True) -> list[str]:
    """Gathers the names of the classes, numbers in their order and text in that of the alphabet.

    Args:
        labels: Those of each domain.
        what: What messages call the samples, e.g. "texts".
        same: Whether all domains must have the same classes.

    Raises:
        DataError: The domains' classes differ, or there is but one class.
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
    """Refuses domains whose classes differ, and says which has what alone; and names that config.yaml cannot hold.

    Raises:
        DataError: They differ, or one is no UTF-8.
    """
    for name, classes in found.items():
        for label in classes:
            if printable(label) != label:
                raise DataError(
                    f"{name}: the name of the class {printable(label)} is no UTF-8; rename its folder or files"
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
    """Labels of N samples -> their numbers in `class_names`, (N,) int64, or, where it is None, (N,) float32.

    Raises:
        DataError: A label is missing, not among the classes, or no number where there are no classes.
    """
    if class_names is None:
        return read_numbers(labels, at, "label").astype(np.float32)
    check_present(labels, at, "label")
    number = {class_name(name): place for place, name in enumerate(class_names)}
    distinct, places = _distinct(labels)
    for name in map(class_name, distinct):
        check_known("classes", name, number, "class")
    return np.array([number[class_name(cell)] for cell in distinct], np.int64)[places]


def _distinct(cells: Cells) -> tuple[list[Any], Array]:
    """The values of N cells, each once, and the place of each cell's value among them, (N,)."""
    if isinstance(cells, np.ndarray):
        values, places = np.unique(cells, return_inverse=True)
        return values.tolist(), places
    number = {value: place for place, value in enumerate(dict.fromkeys(cells))}
    return list(number), np.array([number[cell] for cell in cells], np.int64)


def read_numbers(cells: Cells, at: At, what: str) -> Array:
    """Cells of a column as finite numbers, (N,) float64.

    Raises:
        DataError: One is no number.
    """
    check_present(cells, at, what)
    typed = isinstance(cells, np.ndarray) and cells.dtype.kind in "iuf"
    numbers = np.asarray(cells if typed else [as_number(cell) for cell in cells], np.float64)
    for row in np.flatnonzero(~np.isfinite(numbers))[:1].tolist():
        advice = ", or pass --data.kind classes" if what == "label" else ""
        raise DataError(f"{at(row)}: its {what} '{cells[row]}' is no number; mend it{advice}")
    return numbers


def read_weights(cells: Cells, at: At) -> list[float]:
    """How much the loss of each sample counts.

    Raises:
        DataError: A weight is missing, no number or negative, or all are 0.
    """
    weights: list[float] = read_numbers(cells, at, "weight").tolist()
    for row, weight in enumerate(weights):
        if weight < 0:
            raise DataError(f"{at(row)}: its weight {weight:g} is negative; mend it")
    if not any(weights):
        raise DataError(f"{at(0)}: its weight is 0, as all others are; mend them, or leave --data.weight out")
    return weights


def check_present(cells: Cells, at: At, what: str) -> None:
    """Refuses a column in which a cell is missing: None, nan or empty text.

    Raises:
        DataError: One is missing.
    """
    if isinstance(cells, np.ndarray) and cells.dtype.kind != "O":
        absent = np.flatnonzero(cells == "" if cells.dtype.kind == "U" else cells != cells).tolist()
    else:
        absent = [row for row, cell in enumerate(cells) if cell is None or cell == "" or cell != cell]
    if absent:
        raise DataError(f"{at(absent[0])}: its {what} is missing; fill it in or remove the row")


def class_name(label: Any) -> str:
    """A label as text, a whole number without a point."""
    number = as_number(label)
    return str(int(number)) if number.is_integer() and str(number) == str(label) else str(label)


def as_number(cell: Any) -> float:
    """A cell as a number, nan where it is none."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan
