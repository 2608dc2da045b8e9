"""Rows of tables: files of any usual format, frames, arrays, and the features that `tl embed` wrote.

file -> columns and labels -> split -> what the columns are, by the training rows (columns.py) -> (x, y)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.base import TransferDataModule
from datamodules.columns import Cells, Columns, encode, learn, numeric_names, one_hot
from datamodules.domain_folders import check_known
from datamodules.errors import DataError
from datamodules.image import check_fractions
from datamodules.splits import Subset, complete_splits, content_hash
from datamodules.tables import Table, read_columns, read_table

Array = np.ndarray[Any, Any]


class Rows(Dataset[Any]):
    """Rows in memory; x is (D,), or {"numeric": (D,), "categorical": (K,)} where there are categories.

    Attributes:
        targets: The labels, class numbers or real values.
        ids: A name for each row.
        groups: The group of each row, or None.
    """

    def __init__(self, cells: Cells, targets: Array, ids: Sequence[str], groups: Sequence[str] | None) -> None:
        self.cells, self.targets, self.ids, self.groups = cells, targets, ids, groups
        self.numeric, self.categorical = torch.empty(0), torch.empty(0)

    def encode(self, numeric: Array, categorical: Array) -> None:
        """Takes what the cells have become, in their place."""
        self.numeric, self.categorical = torch.from_numpy(numeric), torch.from_numpy(categorical)
        self.cells = Cells(self.cells.count)

    def __len__(self) -> int:
        return self.cells.count

    def fingerprint(self) -> str:
        """What names its contents."""
        return content_hash(self.numeric, self.categorical, self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        x: Any = self.numeric[index]
        if self.categorical.numel():
            x = {"numeric": x, "categorical": self.categorical[index]}
        return x, self.targets[index]


class TabularData(TransferDataModule):
    """Rows of a table, for either domain.

        FILE       CSV and other delimited text, JSONL, parquet, Arrow, Excel: see `frames.read_frame`; in Python also a
                   frame of polars or pandas
        FILE.npz   features (N, D) and labels (N,)
        DIR        as `tl embed` writes it: features.safetensors or features.npy, and index.csv, whose splits are kept;
                   of several domains each takes its own rows

    Numbers stay numbers, truth values become 0 and 1, a date a few numbers, and text categories (columns.py). A gap in
    a column of numbers is its mean, and from 5 % gaps in the labelled training rows on, a column of 0 and 1 says where
    they are; a gap in text is a category of its own. Means and categories are those of the training rows, and a run
    keeps them in its config. Nothing is scaled: that is the model's. Domains keep the columns that they share, by name.
    A file is split in three, by class where labels are classes, and between groups where there are any; `tl predict`
    takes all of it. The ids are the numbers of the rows, from 0 and without the header.

    Args:
        target: The target's file or folder; ~ and $VARIABLES are filled in.
        source: The source's file or folder.
        label: The label's column in a file, by name or by number; -1 is the last. None: there are no labels, for
            `tl predict`.
        kind: Whether labels are "classes" or "values". None: text is classes, and so are whole numbers in an .npz or in
            a folder of `tl embed`; numbers in a file are values.
        threshold: Makes two classes of values, below it, and from it upwards.
        classes: The classes and their order; None gathers them over both domains.
        drop: Columns to leave out, by name or number.
        categorical: Columns of numbers that are categories.
        missing: What else is a gap, by column, e.g. {chol: 0}.
        group: The column of groups, such as patients, which no split tears apart; it is no part of x.
        columns: What the columns are, as a run's config has it; None learns it.
        categories: The columns of text and their categories, each a column of 0 or 1, as runs of version 0.1 have it.
        val_fraction: Share for validation, where nothing else is said.
        test_fraction: Share for testing, where nothing else is said.
        **kwargs: As for `TransferDataModule`.

    Raises:
        DataError: A file cannot be read, a column is unknown, or a label is missing or no number.
    """

    def __init__(
        self,
        target: Path | str | None = None,
        source: Path | str | None = None,
        label: int | str | None = -1,
        kind: Literal["classes", "values"] | None = None,
        threshold: float | None = None,
        classes: list[str] | None = None,
        drop: list[int | str] | None = None,
        categorical: list[int | str] | None = None,
        missing: dict[str, float | str] | None = None,
        group: int | str | None = None,
        columns: dict | None = None,  # type: ignore[type-arg]  # the parser would read the texts in it again
        categories: dict[str, list[str]] | None = None,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        given = {name: what for name, what in (("source", source), ("target", target)) if what is not None}
        if not given:
            raise DataError("target: give a table, --data.target FILE (or --data.source FILE)")
        check_fractions(val_fraction, test_fraction)
        self.fractions, self.has_label = (val_fraction, test_fraction), label is not None
        tables = {name: read_table(what, name, label, group, drop or []) for name, what in given.items()}
        self.columns, self.categories = columns, categories
        read_columns(tables, categorical or [], missing or {}, columns, categories)
        y: Mapping[str, Array] = {name: np.zeros(table.cells.count, np.int64) for name, table in tables.items()}
        self.class_names = classes
        if label is not None:
            y, self.class_names = _label(tables, kind, threshold, classes)
        self.wheres = {name: table.where for name, table in tables.items()}
        self._one_unit = all(table.frame is None for table in tables.values())
        self._whole = {name: Rows(t.cells, y[name], t.ids, t.groups) for name, t in tables.items()}
        self._found: dict[str, dict[str, Dataset[Any]]] = {}
        self._splits: dict[str, dict[str, Dataset[Any]]] = {}
        self._known = False
        for name, table in tables.items():
            whole = self._whole[name]
            splits: dict[str, Dataset[Any]] = {split: Subset(whole, rows) for split, rows in table.splits.items()}
            self._found[name] = splits or {"unsplit": whole}

    @property
    def x_schema(self) -> Mapping[str, Any]:  # type: ignore[override]
        """What x is; learns it where it is not known."""
        self._learn()
        if self.categories is not None:
            return {"numeric": list(map(str, range(next(iter(self._whole.values())).numeric.shape[1])))}
        columns = cast(Columns, self.columns)
        schema: dict[str, Any] = {"numeric": numeric_names(columns)}
        if columns["categorical"]:
            schema["categorical"] = columns["categorical"]
        return schema | ({"one_unit": True} if self._one_unit else {})  # of a network's features

    def _learn(self) -> None:
        """Makes numbers of the cells, by what the training rows say they are."""
        if self._known:
            return
        self._known = True
        if self.columns is None and self.categories is None:
            rows = {name: split["train"] for name, split in self._split().items() if "train" in split}
            shown = {name: part for name, part in rows.items() if name != "target" or not self.target_unseen}
            hidden = self.would_hide_labels(self.wheres)
            labelled = [place for place, name in enumerate(shown) if name != "target" or not hidden]
            parts = [cast(Subset, part).rows for part in shown.values()]
            cells = [self._whole[name].cells for name in shown]
            self.columns = learn(cells, parts, labelled, ", ".join(self.wheres[name] for name in shown))
        for name, whole in self._whole.items():
            if self.categories is not None:
                numeric = one_hot(whole.cells, self.categories, self.wheres[name])
                whole.encode(numeric, np.zeros((len(whole), 0), np.int64))
            else:
                whole.encode(*encode(whole.cells, cast(Columns, self.columns), self.wheres[name]))

    def wrapped(self, seed: int, blind: bool) -> None:
        """Takes both; splits by another seed are made anew."""
        super().wrapped(seed, blind)
        self._splits.clear()

    def domains(self, split: str) -> Mapping[str, Dataset[Any]]:
        """The split's rows in each domain."""
        splits = self._split()
        self._learn()
        for name, found in splits.items():
            if split not in found:
                raise DataError(f"{name}: its index.csv has no row of the split {split}")
        return {name: found[split] for name, found in splits.items()}

    def _split(self) -> dict[str, dict[str, Dataset[Any]]]:
        for name, found in self._found.items():
            if name not in self._splits:
                stratified = self.has_label and self.stratifies(name, self.wheres)
                self._splits[name] = complete_splits(found, self.wheres[name], *self.fractions, self.seed, stratified)
        return self._splits

    def predict_dataloader(self) -> Any:
        """The target's test split, or all its rows where the file says nothing of splits."""
        whole = self._found.get("target", {}).get("unsplit")
        if whole is not None:
            self._learn()
            self._domains["test"] = {"target": whole}
        return super().predict_dataloader()


def _label(
    tables: Mapping[str, Table], kind: str | None, threshold: float | None, classes: list[str] | None
) -> tuple[dict[str, Array], list[str] | None]:
    """The labels of each domain, and the names of the classes (None: they are real values)."""
    for table in tables.values():
        for row in np.flatnonzero(_is_missing(table.labels)):
            raise DataError(f"{table.where} row {row}: its label is missing; fill it in or remove the row")
    if kind is None and threshold is None and classes is None:
        kind = "classes" if any(_tells_classes(table) for table in tables.values()) else "values"
    if kind == "values" or threshold is not None:
        values = {name: _numbers(table) for name, table in tables.items()}
    if threshold is not None:
        above = {name: (numbers >= threshold).astype(np.int64) for name, numbers in values.items()}
        return above, classes or [f"below {threshold:g}", f"from {threshold:g}"]
    if kind == "values":
        return {name: numbers.astype(np.float32) for name, numbers in values.items()}, None
    found = {name: np.unique(table.labels, return_inverse=True) for name, table in tables.items()}
    texts = {name: list(map(_plain, values.tolist())) for name, (values, _) in found.items()}
    all_texts = sorted({text for own in texts.values() for text in own})
    if classes is None:
        numeric = all(np.isfinite(_float(text)) for text in all_texts)
        classes = sorted(all_texts, key=lambda text: (_float(text) if numeric else 0.0, text))
        if len(classes) < 2:
            raise DataError(f"label: all rows have the label {classes[0]}; classification needs at least two classes")
    number = {_plain(text): place for place, text in enumerate(classes)}
    for text in all_texts:
        check_known("classes", text, list(number), "class")
    return {
        name: np.array([number[text] for text in own], dtype=np.int64)[found[name][1]] for name, own in texts.items()
    }, classes


def _is_missing(labels: Array) -> Array:
    return np.isnan(labels) if labels.dtype.kind == "f" else labels == ("" if labels.dtype.kind == "U" else None)


def _numbers(table: Table) -> Array:
    """The labels as real values."""
    if table.labels.dtype.kind != "U":
        return table.labels.astype(np.float64)
    for row, text in enumerate(table.labels.tolist()):
        if not np.isfinite(_float(text)):
            raise DataError(
                f"{table.where} row {row}: its label '{text}' is no number; mend it, or pass --data.kind classes"
            )
    return table.labels.astype(np.float64)


def _plain(label: Any) -> str:
    """A label as text, a whole number without a point."""
    number = _float(label)
    return str(int(number)) if number.is_integer() else str(label)


def _float(text: Any) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _tells_classes(table: Table) -> bool:
    """Whether labels are text without any number, or, in arrays, whole numbers."""
    if table.labels.dtype.kind != "U":
        return table.frame is None and table.labels.dtype.kind in "iub"
    numbers = np.isfinite([_float(text) for text in np.unique(table.labels).tolist()])
    whole = all(text.lstrip("-").isdigit() for text in np.unique(table.labels).tolist())
    return not numbers.any() or (table.frame is None and whole)
