"""Rows of numbers: CSV files, arrays, and the features that `tl embed` wrote.

file -> columns and labels, as text or numbers -> one-hot where it is text -> (x, y), x float32 (D,)
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import TransferDataModule
from datamodules.domain_folders import check_known
from datamodules.errors import DataError
from datamodules.image import check_fractions
from datamodules.paths import expand_path
from datamodules.splits import SPLIT_NAMES, Subset, complete_splits, content_hash

Array = np.ndarray[Any, Any]


class Vectors(Dataset[Any]):
    """Rows of numbers in memory.

    Attributes:
        targets: The labels, class numbers or real values.
        ids: A name for each row.
    """

    def __init__(self, x: Array, targets: Array, ids: list[str]) -> None:
        self.x, self.targets, self.ids = torch.from_numpy(x.astype(np.float32)), targets, ids

    def __len__(self) -> int:
        return len(self.x)

    def fingerprint(self) -> str:
        """What names its contents."""
        return content_hash(self.x, self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.x[index], self.targets[index]


class TabularData(TransferDataModule):
    """Rows of numbers, for either domain.

        FILE.csv   commas, semicolons or tabs; a first line without any number is the header
        FILE.npz   features (N, D) and labels (N,)
        DIR        as `tl embed` writes it: features.safetensors or features.npy, and index.csv, whose splits are kept;
                   of several domains each takes its own rows

    A column of text becomes a 0 or 1 for each of its categories; "?" is one of them, an empty cell is an error. Both
    domains have the same columns. Nothing is scaled: that is the model's, see `TabularMLP`. A file is split in
    three, by class where labels are classes; `tl predict` takes all of it. The ids are the numbers of the rows, from 0
    and without the header.

    Args:
        target: The target's file or folder; ~ and $VARIABLES are filled in.
        source: The source's file or folder.
        label: The label's column in a CSV file, by name or by number; -1 is the last. None: there are no labels, for
            `tl predict`.
        kind: Whether labels are "classes" or "values". None: text is classes, and so are whole numbers in an .npz or in
            a folder of `tl embed`; numbers in a CSV file are values.
        threshold: Makes two classes of values, below it, and from it upwards.
        classes: The classes and their order; None gathers them over both domains.
        categories: The columns of text and their categories; None gathers them over both domains.
        val_fraction: Share for validation, where nothing else is said.
        test_fraction: Share for testing, where nothing else is said.
        **kwargs: As for `TransferDataModule`.

    Raises:
        DataError: A file cannot be read, a cell is missing or is no number, or the domains' columns differ.
    """

    def __init__(
        self,
        target: Path | str | None = None,
        source: Path | str | None = None,
        label: int | str | None = -1,
        kind: Literal["classes", "values"] | None = None,
        threshold: float | None = None,
        classes: list[str] | None = None,
        categories: dict[str, list[str]] | None = None,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if target is None and source is None:
            raise DataError("target: give a CSV file, --data.target FILE (or --data.source FILE)")
        check_fractions(val_fraction, test_fraction)
        paths = {name: expand_path(given, name) for name, given in (("source", source), ("target", target)) if given}
        tables = {name: read_table(path, name, label) for name, path in paths.items() if path is not None}
        x, self.categories = _encode(tables, categories)
        y: Mapping[str, Array] = {name: np.zeros(len(part), np.int64) for name, part in x.items()}
        self.class_names = classes
        if label is not None:
            y, self.class_names = _label(tables, kind, threshold, classes)
        columns = [str(number) for number in range(next(iter(x.values())).shape[1])]
        arrays = all(path.is_dir() or path.suffix == ".npz" for path in paths.values() if path is not None)
        self.x_schema = {"numeric": columns} | ({"one_unit": True} if arrays else {})  # of a network's features
        self.paths, self.fractions, self.has_label = paths, (val_fraction, test_fraction), label is not None
        self._found: dict[str, dict[str, Dataset[Any]]] = {}
        self._splits: dict[str, dict[str, Dataset[Any]]] = {}
        for name, table in tables.items():
            whole = Vectors(x[name], y[name], table.ids)
            splits: dict[str, Dataset[Any]] = {split: Subset(whole, rows) for split, rows in table.splits.items()}
            self._found[name] = splits or {"unsplit": whole}

    def domains(self, split: str) -> Mapping[str, Dataset[Any]]:
        """The split's rows in each domain."""
        for name, found in self._found.items():
            if name not in self._splits:
                stratified = self.has_label and self.stratifies(name, self.paths)
                self._splits[name] = complete_splits(
                    found, str(self.paths[name]), *self.fractions, self.seed, stratified
                )
            if split not in self._splits[name]:
                raise DataError(f"{name}: its index.csv has no row of the split {split}")
        return {name: splits[split] for name, splits in self._splits.items()}

    def predict_dataloader(self) -> Any:
        """The target's test split, or all its rows where the file says nothing of splits."""
        whole = self._found.get("target", {}).get("unsplit")
        if whole is not None:
            self._domains["test"] = {"target": whole}
        return super().predict_dataloader()


@dataclass
class Table:
    """What a file holds.

    Attributes:
        where: Domain and file, for messages.
        cells: (N, D) numbers, or text.
        labels: (N,) numbers, or text.
        ids: A name for each row.
        columns: Names of the columns, or None.
        splits: The rows of each split; empty where the file does not say.
        lines: The line of each row in the file, for messages.
        plain: Whether whole numbers as labels are classes.
    """

    where: str
    cells: Array
    labels: Array
    ids: list[str]
    columns: list[str] | None = None
    splits: dict[str, list[int]] = field(default_factory=dict)
    lines: Sequence[int] = ()
    plain: bool = True

    def at(self, row: int) -> str:
        """Where a row stands."""
        return f"{self.where} line {self.lines[row]}" if self.lines else f"{self.where} row {row}"


def read_table(path: Path, name: str, label: int | str | None) -> Table:
    """Reads a CSV file, an .npz, or a folder of `tl embed`.

    Args:
        path: The file or folder.
        name: The domain.
        label: The label's column in a CSV file; None: there are no labels.

    Raises:
        DataError: It cannot be read or is not as it should be.
    """
    where = f"{name}: {path}"
    try:
        if path.is_dir():
            return _read_embedded(path, name, where)
        return _read_arrays(path, where, label) if path.suffix == ".npz" else _read_csv(path, where, label)
    except (OSError, ValueError, KeyError, EOFError, csv.Error) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise DataError(f"{where} cannot be read as a table ({reason})") from error


def _read_csv(path: Path, where: str, label: int | str | None) -> Table:
    with path.open(newline="", encoding="utf-8-sig") as file:
        first = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter=max(",;\t", key=first.count), skipinitialspace=True)
        found = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    header = found.pop(0)[1] if found and not np.isfinite(_floats(np.array(found[0][1]))).any() else None
    if not found:
        raise DataError(f"{where} has no rows")
    width = len(header or found[0][1])
    for line, row in found:
        if len(row) != width:
            raise DataError(f"{where} line {line} has {len(row)} cells, not {width} as the lines before")
    cells, columns, labels = np.array([row for _, row in found]), header, np.zeros(len(found))
    if label is not None:
        place = _column(label, header, width, where)
        labels, cells = cells[:, place], np.delete(cells, place, 1)
        columns = header and header[:place] + header[place + 1 :]
    return Table(
        where=where,
        cells=cells,
        labels=labels,
        ids=[str(row) for row in range(len(cells))],
        columns=columns,
        lines=[line for line, _ in found],
        plain=False,
    )


def _column(label: int | str, header: list[str] | None, width: int, where: str) -> int:
    if isinstance(label, str):
        if header is None:
            raise DataError(f"label: {where} has no header line, so name the label's column by its number, not {label}")
        check_known("label", label, header, "column")
        return header.index(label)
    if not -width <= label < width:
        raise DataError(f"label: there is no column {label}; {where} has {width}")
    return label % width


def _read_arrays(path: Path, where: str, label: int | str | None) -> Table:
    with np.load(path, allow_pickle=False) as file:
        for key in file:
            if key.endswith(("_features", "_labels")):
                raise DataError(f"{where}: {key} would not be read; an .npz has features and labels, without splits")
        features = file["features"]
        return _numbers(features, np.zeros(len(features)) if label is None else file["labels"], where)


def _read_embedded(path: Path, name: str, where: str) -> Table:
    if (path / "features.npy").is_file():
        features = np.load(path / "features.npy", allow_pickle=False)
    else:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            features = load_file(path / "features.safetensors")["features"]
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    with (path / "index.csv").open(newline="") as file:
        index = list(csv.DictReader(file))
    if len({row["domain"] for row in index}) > 1:
        index = [row for row in index if row["domain"].partition("/")[0] == name]
    if not index:
        raise DataError(f"{where} has no rows of the {name}")
    table = _numbers(features[[int(row["row"]) for row in index]], np.array([row["label"] for row in index]), where)
    table.ids = [row["id"] for row in index]
    for row in index:
        check_known("split", row["split"], SPLIT_NAMES, "split")
    numbers = {split: [n for n, row in enumerate(index) if row["split"] == split] for split in SPLIT_NAMES}
    table.splits = {split: rows for split, rows in numbers.items() if rows}
    return table


def _numbers(features: Array, labels: Array, where: str) -> Table:
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(features):
        raise DataError(
            f"{where}: features and labels have shapes {features.shape} and {labels.shape}, not (N, D) and (N,)"
        )
    if features.dtype.kind not in "fiub":
        raise DataError(f"{where}: features are {features.dtype}, not numbers")
    return Table(where, features, labels, [str(row) for row in range(len(features))])


def _floats(values: Array) -> Array:
    """Numbers as they are, and text as numbers; NaN where it is none."""
    try:
        return values.astype(np.float64)
    except ValueError:
        return np.array([_float(value) for value in values], dtype=np.float64)


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _encode(
    tables: Mapping[str, Table], categories: Mapping[str, list[str]] | None
) -> tuple[dict[str, Array], dict[str, list[str]]]:
    """The columns as numbers, (N, D) in each domain, and the categories of those that are text."""
    one, *others = tables.values()
    columns = next((table.columns for table in tables.values() if table.columns), None)
    for other in others:
        if other.cells.shape[1] != one.cells.shape[1] or (
            one.columns and other.columns and one.columns != other.columns
        ):
            raise DataError(
                f"source, target: their columns differ: {one.columns or one.cells.shape[1]} "
                f"and {other.columns or other.cells.shape[1]}"
            )
    parts: dict[str, list[Array]] = {name: [] for name in tables}
    known: dict[str, list[str]] = {}
    for number in range(one.cells.shape[1]):
        column = columns[number] if columns else str(number)
        texts = {name: table.cells[:, number] for name, table in tables.items()}
        values = {name: _floats(cells) for name, cells in texts.items()}
        if categories is None:
            is_text = not any(np.isfinite(numbers).any() for numbers in values.values())
        else:
            is_text = column in categories
        if is_text:
            known[column] = _categories(tables, texts, column) if categories is None else categories[column]
        for name, table in tables.items():
            wrong = ~np.isfinite(values[name]) if not is_text else ~np.isin(texts[name], known[column])
            for row in np.flatnonzero(wrong):
                what = "number" if not is_text else f"category that was there in training ({', '.join(known[column])})"
                raise DataError(
                    f"{table.at(int(row))}: column {column} is '{texts[name][row]}', no {what}; mend or remove the row"
                )
            each = [values[name]] if not is_text else [texts[name] == category for category in known[column]]
            parts[name] += each
    return {name: np.stack(each, 1).astype(np.float32) for name, each in parts.items()}, known


def _categories(tables: Mapping[str, Table], texts: Mapping[str, Array], column: str) -> list[str]:
    """All texts of a column, in the order of the alphabet."""
    for name, table in tables.items():
        for row in np.flatnonzero(texts[name] == ""):
            raise DataError(f"{table.at(int(row))}: column {column} is empty; fill it in or remove the row")
    found = sorted({str(text) for cells in texts.values() for text in cells})
    count = sum(map(len, texts.values()))
    if len(found) > max(20, count / 2):
        where = ", ".join(table.where for table in tables.values())
        raise DataError(
            f"{where}: column {column} has {len(found)} texts in {count} rows, too many for categories; "
            "leave it out, or write numbers with a point"
        )
    return found


def _label(
    tables: Mapping[str, Table], kind: str | None, threshold: float | None, classes: list[str] | None
) -> tuple[dict[str, Array], list[str] | None]:
    """The labels of each domain, and the names of the classes (None: they are real values)."""
    for table in tables.values():
        for row in np.flatnonzero(table.labels.astype(str) == ""):
            raise DataError(f"{table.at(int(row))}: its label is empty; fill it in or remove the row")
    values = {name: _floats(table.labels) for name, table in tables.items()}
    if kind is None and threshold is None and classes is None:
        kind = "classes" if any(_tells_classes(table) for table in tables.values()) else "values"
    if kind == "values" or threshold is not None:
        for name, table in tables.items():
            for row in np.flatnonzero(~np.isfinite(values[name])):
                raise DataError(
                    f"{table.at(int(row))}: its label '{table.labels[row]}' is no number; mend it, or pass "
                    "--data.kind classes"
                )
    if threshold is not None:
        above = {name: (numbers >= threshold).astype(np.int64) for name, numbers in values.items()}
        return above, classes or [f"below {threshold:g}", f"from {threshold:g}"]
    if kind == "values":
        return {name: numbers.astype(np.float32) for name, numbers in values.items()}, None
    texts = {name: table.labels.astype(str) for name, table in tables.items()}
    found = {str(text) for labels in texts.values() for text in labels}
    if classes is None:
        numeric = all(np.isfinite(_float(text)) for text in found)
        classes = sorted(found, key=lambda text: (_float(text) if numeric else 0.0, text))
        if len(classes) < 2:
            raise DataError(f"label: all rows have the label {classes[0]}; classification needs at least two classes")
    for text in sorted(found):
        check_known("classes", text, classes, "class")
    number = {text: place for place, text in enumerate(classes)}
    return {name: np.array([number[t] for t in labels], dtype=np.int64) for name, labels in texts.items()}, classes


def _tells_classes(table: Table) -> bool:
    """Whether labels are text without any number, or, where a point would tell values, whole numbers."""
    if table.labels.dtype.kind != "U":
        return table.labels.dtype.kind in "iub"
    numbers = np.isfinite(_floats(table.labels))
    whole = all(text.lstrip("-").isdigit() for text in table.labels)
    return not numbers.any() or (table.plain and whole)
