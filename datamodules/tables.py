"""Contents of table files: labels, groups and columns of each domain, and the columns that domains share."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.columns import Cells, Columns, as_text, is_text, names_of, read_cells, some
from datamodules.errors import DataError, check_known
from datamodules.frames import DATE, MISSING, QUANTITY, scan_frame, tries, typed
from datamodules.labels import read_weights
from datamodules.paths import expand_path
from datamodules.roles import column_of, is_bare, label_column, read_labels, read_splits
from datamodules.splits import SPLIT, SPLIT_NAMES, log

if TYPE_CHECKING:
    from polars import DataType, Expr, LazyFrame

Array = np.ndarray[Any, Any]
FEW = 2  # different texts among numbers, up to which these may be gaps


@dataclass
class Table:
    """The contents of one file.

    Attributes:
        where: Domain and file, for messages.
        labels: (N,) numbers, NaN if missing, or text, "" if missing.
        ids: The name of each row.
        cells: The columns, once they have been read.
        frame: The columns, if they are still in the file.
        splits: The rows of each split; empty if the file does not define splits.
        groups: The group of each row, or None.
        weights: How much the loss of each row counts, or None.
        label: The column of labels, by name, or by number in a file without a header; None if there are no labels.
    """

    where: str
    labels: Array
    ids: Sequence[str]
    cells: Cells
    frame: LazyFrame | None = None
    splits: Mapping[str, Sequence[int] | Array] = field(default_factory=dict)
    groups: list[str] | None = None
    weights: list[float] | None = None
    label: int | str | None = None

    def at(self, row: int) -> str:
        """Returns the name of a row for messages."""
        return f"{self.where} row {row}"


class RowNumbers(Sequence[str]):
    """The names "0", "1", ..., which take no memory."""

    def __init__(self, count: int) -> None:
        self.rows = range(count)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: Any) -> Any:
        return str(self.rows[row])


def read_table(
    given: Any,
    name: str,
    label: int | str | None,
    group: int | str | None = None,
    drop: Sequence[int | str] = (),
    weight: int | str | None = None,
    categorical: Sequence[int | str] = (),
    columns: Columns | None = None,
    unlabelled: bool = False,
) -> Table:
    """Reads labels, groups, weights and splits; for arrays also the columns.

    Args:
        given: The path of a file or of a folder written by `tl embed`, or a frame.
        name: The domain.
        label: The column of labels; None: there are no labels.
        group: The column of groups, or None.
        drop: Columns to leave out; here only those given by number, `read_columns` drops the others.
        weight: The column of weights, or None.
        categorical: Columns of numbers that are categories.
        columns: The meaning of the columns, if it is known: text is then read as it is.
        unlabelled: Whether the column of labels may be lacking.

    Raises:
        DataError: The table cannot be read or is malformed.
    """
    known = names_of(columns) if columns else []
    splits = SPLIT not in {label, group, weight, *drop, *categorical, *known}
    if columns:  # numbers count the columns of the file that was learnt from
        drop, unlabelled = [], True
    arguments = label, group, drop, weight, splits, unlabelled, known
    if not isinstance(given, str | Path):
        import polars

        frame = given if isinstance(given, polars.DataFrame) else polars.from_pandas(given)
        return _read_frame(frame.lazy(), f"{name}: the frame", *arguments)
    path = expand_path(given, name)
    assert path is not None
    where = f"{name}: {path}"
    if not path.is_dir() and path.suffix != ".npz":
        named = [each for each in (label, group, *map(str, categorical)) if each is not None]
        texts = set(columns["categorical"] if columns else ()) - set(named)
        return _read_frame(scan_frame(path, where, texts, named), where, *arguments)
    if weight is not None:
        raise DataError(f"weight: {where} is not a table with a column {weight}; leave it out")
    try:
        table = _read_embedded(path, name, where) if path.is_dir() else _read_arrays(path, where, label)
        table.label = label
        return table
    except (OSError, ValueError, KeyError, EOFError, csv.Error) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise DataError(f"{where} cannot be read as a table ({reason})") from error


def _read_frame(
    frame: LazyFrame,
    where: str,
    label: int | str | None,
    group: int | str | None,
    drop: Sequence[int | str],
    weight: int | str | None,
    splits: bool,
    unlabelled: bool,
    known: Collection[str],
) -> Table:
    import polars

    kinds = frame.collect_schema()
    names = kinds.names()
    apart = [column_of("drop", each, names, where) for each in drop if isinstance(each, int)]
    count = frame.select(polars.len()).collect().item()
    table = Table(where, np.zeros(count), RowNumbers(count), Cells(count))
    if splits and SPLIT in names and label != names.index(SPLIT):
        table.splits = read_splits(frame, kinds[SPLIT], where)
        apart += [SPLIT] if table.splits else []
    if label is not None:
        last = isinstance(label, int) and label < 0  # counted without the column of splits
        counted = [name for name in names if not (last and table.splits and name == SPLIT)]
        name = label_column(label, counted, where, unlabelled, known)
        if name is None:
            log.info("%s has no labels for lack of a column %s", where, label)
        else:
            apart.append(name)
            table.label = names.index(name) if is_bare(names) else name
            table.labels = read_labels(frame, name, kinds[name])
    if group is not None:
        name = column_of("group", group, names, where)
        apart.append(name)
        table.groups = frame.select(as_text(name, kinds[name]).fill_null("")).collect()[name].to_list()
    if weight is not None and table.label is not None:
        name = column_of("weight", weight, names, where)
        apart.append(name)
        table.weights = read_weights(frame.select(name).collect()[name].to_list(), table.at)
    if not set(names) - set(apart):
        raise DataError(
            f"{where} has no column beside {' and '.join(apart)}; cells are delimited by tab, semicolon, bar or comma"
        )
    table.frame = frame.drop(apart, strict=False)
    return table


def read_columns(
    tables: Mapping[str, Table],
    drop: Sequence[int | str],
    categorical: Sequence[int | str],
    missing: Mapping[str, float | str],
    columns: Columns | None,
    categories: Mapping[str, list[str]] | None,
) -> None:
    """Reads the columns that all files share, or that are already known; a text column of one is text in all.

    Raises:
        DataError: The domains share no columns, or a column is unknown.
    """
    frames = {name: table.frame for name, table in tables.items() if table.frame is not None}
    if len(frames) < len(tables):
        widths = {len(_names(table)) for table in tables.values()}
        if len(widths) > 1:
            raise DataError(f"source, target: their columns differ in number: {' and '.join(map(str, sorted(widths)))}")
    if not frames:
        return

    frames = _same_names(frames)
    all_names = list(dict.fromkeys(column for frame in frames.values() for column in frame.collect_schema()))
    wanted, unwanted = list(map(str, categorical)), [column for column in drop if isinstance(column, str)]
    for argument, names in (("drop", unwanted), ("categorical", wanted), ("missing", missing)):
        for column in names:
            if columns is None:
                check_known(argument, column, all_names, "column")
    for name, frame in frames.items():
        for column in missing:
            if column in frame.collect_schema():
                frame = frame.with_columns(_without(column, frame.collect_schema()[column], missing[column]))
        # a column of text may be numbers without its gaps, unless it is known to be text
        frame = typed(frame, set(missing) - ((columns or {}).get("categorical", {}).keys() - set(wanted)))
        frames[name] = frame.drop(unwanted, strict=False)
        if not frames[name].collect_schema():
            raise DataError(
                f"drop: {tables[name].where} has no other column beside the label; leave one out of --data.drop"
            )
    kinds = {name: frame.collect_schema() for name, frame in frames.items()}
    if columns is None:
        shared = _shared(kinds)
        text = (column for column in shared if any(is_text(kind[column]) for kind in kinds.values()))
        texts: Collection[str] = dict.fromkeys([*wanted, *text]) if categories is None else categories
        for name, frame in frames.items() if categories is None else ():
            own = [column for column in texts if column not in wanted and is_text(kinds[name][column])]
            _check_texts(frame, own, tables[name].where)
        known = shared
    else:
        texts, known = columns["categorical"], names_of(columns)
    for table in tables.values():
        if table.frame is None:  # an array beside a file
            table.cells.numbers = dict(zip(known, table.cells.numbers.values(), strict=False))
    for name, kind in kinds.items():
        own, where = [column for column in known if column in kind], tables[name].where
        if not own:
            raise DataError(
                f"{where} has none of the columns of training, {some(known)}; it has {some(list(kind))}; rename them"
            )
        if absent := [column for column in known if column not in kind]:
            if all(map(str.isdecimal, kind)):
                raise DataError(
                    f"{where} lacks columns of training, {some(absent)}, and has no header that tells which"
                )
            log.warning("%s lacks columns seen in training: %s; their cells count as missing", where, some(absent))
        numbers = [column for column in own if column not in texts]
        if columns is not None:
            _check_dates(kind, numbers, {each.get("of") for each in columns["numeric"]}, where)
        tables[name].cells = read_cells(
            frames[name], tables[name].cells.count, [c for c in own if c in texts], numbers, where
        )


def _check_dates(
    kinds: Mapping[str, DataType], names: Collection[str], dates: Collection[str | None], where: str
) -> None:
    """Rejects numbers where training had dates, and dates where it had numbers."""
    for name in names:
        has, had = ("numbers", "dates") if name in dates else ("dates", "numbers")
        wrong = kinds[name].is_temporal() if had == "numbers" else kinds[name].is_numeric()
        if wrong:
            advice = ", e.g. 2024-12-31" if had == "dates" else ""
            raise DataError(f"{where}: column {name} has {has}, and training had {had}; write {had}{advice}")


def _check_texts(frame: LazyFrame, names: Sequence[str], where: str) -> None:
    """Rejects text columns that are mostly numbers or dates, if one or two texts are repeated, or whose dates are open.

    Such texts could be gaps, or the whole column names.
    """
    import polars

    text = {name: polars.col(name).cast(polars.String).str.strip_chars() for name in names}
    there = {name: cell.filter(cell.is_in(MISSING).not_()) for name, cell in text.items()}
    is_odd = {name: cell.str.contains(f"{QUANTITY}|{DATE}").not_() for name, cell in there.items()}
    odd = {name: there[name].filter(is_odd[name]) for name in names}
    dates = {f"{name}/": there[name].str.contains(DATE).all() for name in names}
    shares = {name: cell.mean() for name, cell in is_odd.items()}
    found = frame.select(**shares, **dates).collect(engine="streaming")
    for name in names:
        if 0 < (found[name].item() or 0) < 0.5 and frame.select(odd[name].n_unique()).collect().item() <= FEW:
            cell = frame.select(odd[name].first()).collect().item()
            raise DataError(
                f"{where}: column {name} has '{cell}' among numbers or dates; pass --data.missing.{name} '{cell}' if "
                f"it means a gap, --data.categorical+={name} if all of them are names, or correct the column"
            )
        if found[f"{name}/"].item() and found[name].item() is not None:
            first = frame.select(there[name].first()).collect().item()
            forms = tries(text[name], first)
            if len(forms) == 1:  # its form is clear
                wrong = text[name].filter(text[name].is_in(MISSING).not_() & forms[0].is_null())
                cell = frame.select(wrong.first()).collect().item()
                raise DataError(f"{where}: column {name} has {cell} among dates like {first}; correct it")
            raise DataError(
                f"{where}: column {name} has dates like {first}, and its "
                "cells do not tell the order of day, month and year, or differ in it; write 2024-12-31, or pass "
                f"--data.categorical+={name} or --data.drop+={name}"
            )


def _without(column: str, kind: DataType, value: float | str) -> Expr:
    """Returns a column in which cells of this value are gaps."""
    import polars

    cell = polars.col(column)
    same = cell == value if kind.is_numeric() and not isinstance(value, str) else as_text(column, kind) == str(value)
    return polars.when(~same).then(cell)


def _names(table: Table) -> list[str]:
    return table.frame.collect_schema().names() if table.frame is not None else list(table.cells.numbers)


def _same_names(frames: Mapping[str, LazyFrame]) -> dict[str, LazyFrame]:
    """Gives a frame without a header the names of another of the same width."""
    names = {name: frame.collect_schema().names() for name, frame in frames.items()}
    header = next((each for each in names.values() if not all(map(str.isdecimal, each))), None)
    return {
        name: frame.rename(dict(zip(names[name], header, strict=True)))
        if header and all(map(str.isdecimal, names[name])) and len(names[name]) == len(header)
        else frame
        for name, frame in frames.items()
    }


def _shared(kinds: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the columns that all files share, and logs those that only one has."""
    one, *others = kinds.values()
    shared = [column for column in one if all(column in other for other in others)]
    apart = {name: [column for column in kind if column not in shared] for name, kind in kinds.items()}
    bare = all(column.isdecimal() for kind in kinds.values() for column in kind)
    if not shared or (bare and any(apart.values())):
        raise DataError(
            "source, target: their columns differ: "
            + " and ".join(str(len(kind) if bare else list(kind)) for kind in kinds.values())
        )
    if any(apart.values()):
        said = "; ".join(f"only {name} has {some(names)}" for name, names in apart.items() if names)
        log.info("source, target: the %d columns that both have are used; %s", len(shared), said)
    return shared


def _read_arrays(path: Path, where: str, label: int | str | None) -> Table:
    with np.load(path, allow_pickle=False) as file:
        for key in file:
            if key.endswith(("_features", "_labels")):
                raise DataError(f"{where}: unknown array {key}; an .npz file has features and labels, without splits")
        features = file["features"]
        return _numbers(features, np.zeros(len(features), int) if label is None else file["labels"], where)


def _read_embedded(path: Path, name: str, where: str) -> Table:
    if not (path / "index.csv").is_file():
        raise DataError(f"{where} is a folder without the index.csv of `tl embed`; name one table")
    if (path / "features.npy").is_file():
        features = np.load(path / "features.npy", allow_pickle=False)
    else:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            features = load_file(path / "features.safetensors")["features"]
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    with (path / "index.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
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
    for row, column in zip(*np.nonzero(~np.isfinite(features)), strict=True):
        raise DataError(f"{where} row {row}: column {column} is {features[row, column]}, not a number; fix it")
    columns = {str(number): features[:, number].astype(np.float32) for number in range(features.shape[1])}
    count = len(features)
    return Table(where, labels, [str(row) for row in range(count)], Cells(count, columns))
