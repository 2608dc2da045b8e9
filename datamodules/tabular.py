"""Rows of tables: files of any common format, frames, arrays, and the features written by `tl embed`.

file -> columns and labels -> split -> meaning of the columns, learnt from training rows (columns.py) -> (x, y)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.columns import Cells, Columns, encode, kinds_of, learn, numeric_names, one_hot, row_keys
from datamodules.errors import DataError
from datamodules.file_domains import FileDomains
from datamodules.frames import CODE
from datamodules.labels import as_number, check_present, encode_labels, gather_classes, read_numbers
from datamodules.splits import Subset, content_hash, log, no_labels
from datamodules.tables import Table, read_columns, read_table

Array = np.ndarray[Any, Any]


class Rows(Dataset[Any]):
    """Rows in memory; x is (D,), or {"numeric": (D,), "categorical": (K,)} if there are categories.

    Attributes:
        targets: The labels, class numbers or real values.
        ids: The name of each row.
        groups: The group of each row, or None.
        weights: How much the loss of each row counts, or None.
        unlabelled: If there are no labels, a sentence that says what is missing.
    """

    unlabelled = ""

    def __init__(self, table: Table, targets: Array) -> None:
        self.cells, self.targets, self.ids = table.cells, targets, table.ids
        self.groups, self.weights = table.groups, table.weights
        self.numeric, self.categorical = torch.empty(0), torch.empty(0)

    def encode(self, numeric: Array, categorical: Array) -> None:
        """Sets the encoded columns."""
        self.numeric, self.categorical = torch.from_numpy(numeric), torch.from_numpy(categorical)
        self.cells = Cells(self.cells.count)

    def __len__(self) -> int:
        return self.cells.count

    def fingerprint(self) -> str:
        """Returns a hash of the contents."""
        return content_hash(self.numeric, self.categorical, self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        x: Any = self.numeric[index]
        if self.categorical.numel():
            x = {"numeric": x, "categorical": self.categorical[index]}
        return x, self.targets[index]


class TabularData(FileDomains):
    """Rows of a table, for either domain.

        FILE       CSV and other delimited text, JSONL, parquet, Arrow, Excel: see `frames.read_frame`; in Python also a
                              polars or pandas frame
        FILE.npz   features (N, D) and labels (N,)
        DIR        written by `tl embed`: features.safetensors or features.npy, and index.csv, whose splits are kept; of
                              several domains each takes its own rows

    Numbers stay numbers, truth values become 0 and 1, a date several numbers, and text categories (columns.py). A gap
    in a numeric column becomes the column's mean; if at least 5 % of the labelled training rows have a gap, a 0/1
    column marks them; a gap in text is a category of its own. Means and categories come from the training rows, and a
    run keeps them in its config, with the label's name. Columns are not standardised here; the backbone does that.
    Domains keep the columns that they share, by name. A column `split` of train, val and test, in any spelling, defines
    the splits; otherwise a file is split in three, stratified by class if labels are classes, and between groups if
    there are any, and `tl predict` takes all of it. The ids are the row numbers, from 0 and without the header.

    Args:
        target: The target's file or folder; ~ and $VARIABLES are expanded.
        source: The source's file or folder.
        label: The column of labels, by name or number; -1 is the last. A run keeps its name, and a table without it is
            unlabelled, as a target without the label that its source has. None: there are no labels.
        kind: Whether labels are "classes" or "values". None: text is classes, and so are whole numbers in an .npz file
            or a folder of `tl embed`; numbers in other files are values.
        threshold: Makes values two classes: below it, and from it upwards.
        classes: The classes and their order; None gathers them over both domains.
        drop: Columns to leave out, by name or number.
        categorical: Numeric columns that are categories, by name.
        missing: Further values that mean a gap, by column, e.g. {chol: 0}.
        group: The column of groups, such as patients, which are never divided between splits; it is not part of x.
        weight: The column that says how much the loss of each row counts, from 0 up; it is not part of x.
        columns: The meaning of the columns, as saved in a run's config; None learns it.
        categories: The text columns and their categories, each a 0/1 column, as in version 0.1.
        **kwargs: As for `TransferDataModule`.

    Raises:
        DataError: A file cannot be read, a column is unknown, or a label is missing or not a number.
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
        weight: int | str | None = None,
        columns: dict | None = None,  # type: ignore[type-arg]  # a precise type would make the parser re-read its texts
        categories: dict[str, list[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        given = {name: what for name, what in (("source", source), ("target", target)) if what is not None}
        if not given:
            raise DataError("target: give a table, --data.target FILE (or --data.source FILE)")
        tables = {
            name: read_table(
                what,
                name,
                label,
                group,
                drop or [],
                weight,
                categorical or [],
                columns,
                len(given) > 1 and name == "target",
            )
            for name, what in given.items()
        }
        labelled = {name: table for name, table in tables.items() if table.label is not None}
        named = {table.label for table in labelled.values()}
        self.label = named.pop() if len(named) == 1 else label
        told = " and ".join(dict.fromkeys(f"column {table.label}" for table in labelled.values()))
        self._label_is = f"; label: {told}; --data.label chooses another" if told else ""
        self._columns, self.categories = columns, categories
        read_columns(tables, drop or [], categorical or [], missing or {}, columns, categories)
        y: Mapping[str, Array] = {name: np.zeros(table.cells.count, np.int64) for name, table in tables.items()}
        self.class_names = classes
        if label is not None:
            own, self.class_names = _label(labelled, kind, threshold, classes)
            y = {**y, **own}
        self.wheres = {name: table.where for name, table in tables.items()}
        self._one_unit = all(table.frame is None for table in tables.values())
        self._whole = {name: Rows(table, y[name]) for name, table in tables.items()}
        for name in tables.keys() - labelled.keys():
            lacking = "--data.label" if label is None else f"a column {label}"
            self._whole[name].unlabelled = no_labels(self.wheres[name], lacking)
        self._found: dict[str, dict[str, Dataset[Any]]] = {}
        self._known = False
        for name, table in tables.items():
            whole = self._whole[name]
            splits: dict[str, Dataset[Any]] = {split: Subset(whole, rows) for split, rows in table.splits.items()}
            self._found[name] = splits or {"unsplit": whole}

    def resolve(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Also decides the column of labels, by name, so that a run finds it in tables of other columns."""
        return super().resolve(defaults) | {"label": self.label}

    @property
    def columns(self) -> Columns | None:
        """Returns the meaning of the columns, see columns.py; None beside `categories`."""
        self._learn()
        return self._columns

    @property
    def x_schema(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Describes x; learns it if it is not known yet."""
        self._learn()
        columns = self._columns
        width = next(iter(self._whole.values())).numeric.shape[1]
        schema: dict[str, Any] = {"numeric": numeric_names(columns) if columns else list(map(str, range(width)))}
        if columns and columns["categorical"]:
            schema["categorical"] = dict(sorted(columns["categorical"].items()))
        return schema | ({"one_unit": True} if self._one_unit else {})  # for features of a network

    def _learn(self) -> None:
        """Encodes the cells as numbers, by what the training rows say."""
        if self._known:
            return
        self._known = True
        if self._columns is None and self.categories is None:
            splits = {name: self.splits(name) for name in self.wheres}
            rows = {name: split["train"] for name, split in splits.items() if "train" in split}
            shown = {name: part for name, part in rows.items() if name != "target" or not self.target_unseen}
            if not shown:
                raise DataError(f"{', '.join(self.wheres.values())}: no row is for training, which learns the columns")
            hidden = self.would_hide_labels(self.wheres)
            labelled = [position for position, name in enumerate(shown) if name != "target" or not hidden]
            parts = [cast(Subset, part).rows for part in shown.values()]
            cells = [self._whole[name].cells for name in shown]
            where = ", ".join(self.wheres[name] for name in shown)
            self._columns = learn(cells, parts, labelled, where)
            if not self._one_unit:
                log.info("%s: read as %s%s", where, kinds_of(self._columns), self._label_is)
        for name, whole in self._whole.items():
            if self.categories is not None:
                numeric = one_hot(whole.cells, self.categories, self.wheres[name])
                whole.encode(numeric, np.zeros((len(whole), 0), np.int64))
            else:
                whole.encode(*encode(whole.cells, cast(Columns, self._columns), self.wheres[name]))

    def warn_of_copies(self) -> None:
        """Tells how many rows of validation and test have the values of a training row; labels are not read."""
        self._learn()
        found: dict[bool, list[Array]] = {True: [], False: []}
        for name, whole in self._whole.items():
            keys = row_keys(whole.numeric.numpy(), whole.categorical.numpy())
            splits = self.splits(name)
            for split, part in splits.items():
                if split != "test" or part is not splits.get("val"):
                    found[split == "train"].append(keys[cast(Subset, part).rows])
        if found[True] and found[False]:
            repeated = np.isin(np.concatenate(found[False]), np.concatenate(found[True]))
            where, count = ", ".join(self.wheres.values()), int(repeated.sum())
            if count:
                told = "%s: %d of %d rows for validation and testing have the same values as a training row"
                log.info(told, where, count, len(repeated))

    def parts(self, name: str) -> Mapping[str, Dataset[Any]]:
        """Returns the rows of a domain by split, as far as its file defines splits."""
        return self._found[name]

    def whole(self) -> Dataset[Any] | None:
        """Returns all rows of the target, if its file does not define splits."""
        self._learn()
        return super().whole()

    def domains(self, split: str) -> Mapping[str, Dataset[Any]]:
        """Returns the split's rows in each domain."""
        found = super().domains(split)
        self._learn()
        return found


def _label(
    tables: Mapping[str, Table], kind: str | None, threshold: float | None, classes: list[str] | None
) -> tuple[dict[str, Array], list[str] | None]:
    """Returns the labels of each domain, and the names of the classes (None for real values)."""
    for table in tables.values():
        check_present(table.labels, table.at, "label")
    if threshold is not None:
        above = {name: read_numbers(t.labels, t.at, "label") >= threshold for name, t in tables.items()}
        names = classes or [f"below {threshold:g}", f"from {threshold:g}"]
        return {name: each.astype(np.int64) for name, each in above.items()}, names
    if kind is None and classes is None:
        kind = "classes" if any(_tells_classes(table) for table in tables.values()) else "values"
    if kind == "values":
        classes = None
    elif classes is None:
        classes = gather_classes({name: table.labels for name, table in tables.items()}, "rows", same=False)
    return {name: encode_labels(table.labels, classes, table.at) for name, table in tables.items()}, classes


def _tells_classes(table: Table) -> bool:
    """Returns whether labels are classes: text without any number, codes, or, in arrays, whole numbers."""
    if table.labels.dtype.kind != "U":
        return table.frame is None and table.labels.dtype.kind in "iub"
    texts = np.unique(table.labels).tolist()
    numbers = np.isfinite([as_number(text) for text in texts])
    codes = any(re.match(CODE, text) for text in texts)  # 001 is a name
    return codes or not numbers.any() or (table.frame is None and all(text.lstrip("-").isdigit() for text in texts))
