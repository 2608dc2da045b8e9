"""Which columns of a table are its labels and its splits, and what they say."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.columns import as_text, is_text
from datamodules.errors import DataError, check_known
from datamodules.frames import MISSING
from datamodules.splits import SPLIT, SPLITS, split_of

if TYPE_CHECKING:
    from polars import DataType, LazyFrame

Array = np.ndarray[Any, Any]


def read_labels(frame: LazyFrame, name: str, kind: DataType) -> Array:
    """Returns a column as labels, (N,): numbers, NaN if missing, or text, "" if missing."""
    import polars

    if kind.is_numeric():
        numbers = frame.select(polars.col(name).cast(polars.Float64).fill_null(float("nan"))).collect()
        labels: Array = numbers[name].to_numpy()
        return labels
    texts = frame.select(as_text(name, kind).fill_null("")).collect()[name]
    distinct = texts.unique(maintain_order=True)
    codes = texts.cast(polars.Enum(distinct)).to_physical().to_numpy()
    names = np.array(["" if text in MISSING else text for text in distinct])
    labels = names[codes]
    return labels


def label_column(
    label: int | str, names: list[str], where: str, unlabelled: bool, known: Collection[str]
) -> str | None:
    """Returns the column of labels; None if it may be lacking and is, or if its number is that of a known feature."""
    bare = isinstance(label, str) and is_bare(names)
    absent = label not in names if isinstance(label, str) else not -len(names) <= label < len(names)
    if unlabelled and absent and not bare:
        return None
    name = column_of("label", label, names, where)
    return None if isinstance(label, int) and name in known else name


def read_splits(frame: LazyFrame, kind: DataType, where: str) -> dict[str, Array]:
    """Returns the rows of each split that a column `split` names; none if none of its cells is the name of a split.

    Raises:
        DataError: Some cells are names of splits, and others are not.
    """
    if not is_text(kind):
        return {}
    cells = frame.select(as_text(SPLIT, kind).fill_null("")).collect()[SPLIT]
    ours = {cell: split_of(cell) for cell in cells.unique(maintain_order=True).to_list()}
    if not any(ours.values()):
        return {}
    for cell, split in ours.items():
        if split is None:
            raise DataError(
                f"{where}: column {SPLIT} has '{cell}' among names of splits; write train, val or test, or pass "
                f"--data.drop+={SPLIT}, or --data.categorical+={SPLIT} if it is a feature"
            )
    split = cells.replace_strict(ours).to_numpy()
    return {name: np.flatnonzero(split == name) for name in SPLITS if name in ours.values()}


def is_bare(names: Sequence[str]) -> bool:
    """Returns whether columns have numbers, for lack of a header."""
    return list(names) == list(map(str, range(len(names))))


def column_of(field: str, wanted: int | str, names: list[str], where: str) -> str:
    """Returns the name of the column that an argument names, or numbers.

    Raises:
        DataError: There is no such column.
    """
    if isinstance(wanted, str):
        if is_bare(names) and wanted not in names:
            raise DataError(f"{field}: {where} has no header line, so give the column's number, not {wanted}")
        check_known(field, wanted, names, "column")
        return wanted
    if not -len(names) <= wanted < len(names):
        raise DataError(f"{field}: there is no column {wanted}; {where} has {len(names)} columns")
    return names[wanted]
