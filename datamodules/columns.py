"""The columns of a table as numbers: what they are is learnt on training rows, and is plain data that a run keeps.

number, truth value     float32; a gap is the column's mean, and where training has gaps a column of 0 and 1 says so
date                    days since 1970, and sine and cosine of the place in year and week, and of a time in the day
text                    a category, 1, 2, ...; a gap is a category of its own, "", and what training had not is 0

    {"numeric": [{"name": "age", "mean": 38.6}, {"name": "debt", "mean": 7.1, "gaps": True}],
     "categorical": {"job": ["", "clerk"]}}

Columns of numbers keep their order, categories are in the order of their names: a config keeps that of lists only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.arrays import empty_array
from datamodules.errors import DataError
from datamodules.splits import log

if TYPE_CHECKING:
    from polars import DataType, Expr, LazyFrame

Array = np.ndarray[Any, Any]
Columns = dict[str, Any]
BLOCK = 1 << 18  # rows that are encoded at a time
FEW_GAPS = 0.05  # share of gaps in the labelled rows below which nothing could be learnt of them


@dataclass
class Cells:
    """The columns of one file, compact.

    Attributes:
        count: N.
        numbers: Float32 (N,) by name; a gap is NaN.
        texts: Number of the text, (N,), and the texts, by name; a gap is -1.
        dates: The date that a numeric column was made of, by the column's name.
        order: The columns as the file has them.
    """

    count: int
    numbers: dict[str, Array] = field(default_factory=dict)
    texts: dict[str, tuple[Array, list[str]]] = field(default_factory=dict)
    dates: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


def is_text(kind: DataType) -> bool:
    """Whether a column holds text."""
    import polars

    return kind == polars.String or isinstance(kind, polars.Categorical | polars.Enum)


def as_text(name: str, kind: DataType) -> Expr:
    """A column as text, whole numbers without a point, so that 1.0 of one file is 1 of another."""
    import polars

    column = polars.col(name)
    if not kind.is_float():
        return column.cast(polars.String)
    whole = column.cast(polars.Int64, strict=False)
    return polars.when(column == whole).then(whole.cast(polars.String)).otherwise(column.cast(polars.String))


def read_cells(frame: LazyFrame, count: int, texts: Collection[str], numbers: Collection[str], where: str) -> Cells:
    """Reads columns of `count` rows from a file, in batches, so that at most the compact ones are in memory.

    Raises:
        DataError: A column is neither number, date nor text, or has text among its numbers, or infinite ones.
    """
    import polars

    kinds = frame.collect_schema()
    made = {name: _as_numbers(name, kinds[name], where) for name in numbers}
    numeric = {part: expression for parts in made.values() for part, expression in parts.items()}
    text = {name: as_text(name, kinds[name]) for name in texts}
    found = frame.select(e.drop_nulls().unique().sort().implode().alias(n) for n, e in text.items())
    values = {name: column[0].to_list() for name, column in found.collect(engine="streaming").to_dict().items()}
    codes = {n: e.cast(polars.Enum(values[n])).to_physical().cast(polars.Int32).fill_null(-1) for n, e in text.items()}
    compact = [(e.cast(polars.Float32)).fill_null(float("nan")).alias(n) for n, e in numeric.items()]
    cells = Cells(count, order=[name for name in kinds if name in texts or name in numbers])
    cells.dates = {part: name for name, parts in made.items() for part in parts if part != name}
    cells.numbers = dict(zip(numeric, empty_array((len(numeric), count), np.float32), strict=True))
    cells.texts = {n: (a, values[n]) for n, a in zip(text, empty_array((len(text), count), np.int32), strict=True)}
    start = 0
    for part in frame.select(*compact, *(e.alias(f"\0{n}") for n, e in codes.items())).collect_batches():
        rows = slice(start, start := start + len(part))
        for name, column in cells.numbers.items():
            column[rows] = part[name].to_numpy()
            for row in np.flatnonzero(np.isinf(column[rows])):
                raise DataError(f"{where} row {rows.start + row}: column {name} is infinite; mend or remove it")
        for name, (column, _) in cells.texts.items():
            column[rows] = part[f"\0{name}"].to_numpy()
    for name in set(numbers) & {name for name, kind in kinds.items() if is_text(kind)}:
        lost = frame.select(polars.col(name).filter(numeric[name].is_null() & polars.col(name).is_not_null())).collect()
        if len(lost):
            raise DataError(f"{where}: column {name} has '{lost[name][0]}', no number; mend or remove the row")
    return cells


def _as_numbers(name: str, kind: DataType, where: str) -> dict[str, Expr]:
    """The numeric columns that a number, a truth value or a date becomes."""
    import polars

    column = polars.col(name)
    if is_text(kind):
        return {name: column.cast(polars.String).cast(polars.Float64, strict=False)}
    if kind.is_numeric() or kind in (polars.Boolean, polars.Null):
        return {name: column.cast(polars.Float64)}
    if kind != polars.Date and kind != polars.Datetime:
        raise DataError(f"{where}: column {name} is {kind}, neither number, date nor text; pass --data.drop+={name}")
    days = column.cast(polars.Datetime("ms")).cast(polars.Int64) / 86_400_000
    cycles = {"year": column.dt.ordinal_day() / 365.25, "week": column.dt.weekday() / 7}
    if kind == polars.Datetime:
        cycles["day"] = days % 1
    turns = {f"{name} in {n}": 2 * math.pi * share for n, share in cycles.items()}
    return {name: days} | {f"{n} {wave}": getattr(turn, wave)() for n, turn in turns.items() for wave in ("sin", "cos")}


def learn(
    tables: Sequence[Cells], rows: Sequence[Sequence[int] | Array], labelled: Collection[int], where: str
) -> Columns:
    """What the columns are.

    Args:
        tables: The cells of each domain that training sees.
        rows: The training rows of each.
        labelled: Places of the domains whose labels training sees.
        where: What messages call them.

    Raises:
        DataError: A column of text has too many texts for categories.
    """
    columns: Columns = {"numeric": [], "categorical": {}}
    for name in tables[0].numbers:
        date = {"of": tables[0].dates[name]} if name in tables[0].dates else {}
        parts = [cells.numbers[name][own] for cells, own in zip(tables, rows, strict=True)]
        there = np.concatenate([part[~np.isnan(part)] for part in parts])
        mean = float(there.mean(dtype=np.float64)) if len(there) else 0.0
        columns["numeric"].append({"name": name, "mean": mean} | date)
        gaps = np.mean([np.isnan(part).mean() for place, part in enumerate(parts) if place in labelled] or [0])
        if FEW_GAPS <= gaps < 1:
            columns["numeric"][-1]["gaps"] = True
    for name in tables[0].texts:
        found: set[str] = set()
        for cells, own in zip(tables, rows, strict=True):
            codes, values = cells.texts[name]
            found |= {values[code] if code >= 0 else "" for code in np.unique(codes[own]).tolist()}
        count = sum(map(len, rows))
        if len(found) > max(20, count / 2):
            raise DataError(
                f"{where}: column {name} has {len(found)} texts in {count} rows, too many for categories; "
                f"leave it out, --data.drop+={name}, or write numbers with a point"
            )
        columns["categorical"][name] = sorted(found)
    return columns


def encode(cells: Cells, columns: Columns, where: str) -> tuple[Array, Array]:
    """The numeric columns, float32 (N, D), and the categories, int64 (N, K); says once what training had not."""
    gaps = [known["name"] for known in columns["numeric"] if known.get("gaps")]
    categories = sorted(columns["categorical"].items())
    numeric = empty_array((cells.count, len(columns["numeric"]) + len(gaps)), np.float32)
    categorical = empty_array((cells.count, len(categories)), np.int64)
    numbers: dict[str, Array] = {}  # of each text of the file its category's
    unseen: dict[str, list[str]] = {}
    for name, known in categories:
        number = {value: n for n, value in enumerate(known, 1)}
        values = cells.texts[name][1] if name in cells.texts else []
        numbers[name] = np.array([*(number.get(value, 0) for value in values), number.get("", 0)])  # a gap, -1, is last
        if new := [value for value in values if value not in number]:
            unseen[name] = new
    for start in range(0, cells.count, BLOCK):
        rows = slice(start, start + BLOCK)
        for place, known in enumerate(columns["numeric"]):
            name, mean = known["name"], np.float32(known["mean"])
            column = cells.numbers[name][rows] if name in cells.numbers else np.float32(np.nan)
            missing = np.isnan(column)
            numeric[rows, place] = np.where(missing, mean, column)
            if known.get("gaps"):
                numeric[rows, len(columns["numeric"]) + gaps.index(name)] = missing
        for place, (name, _) in enumerate(categories):
            categorical[rows, place] = numbers[name][cells.texts[name][0][rows] if name in cells.texts else -1]
    for name, new in unseen.items():
        log.warning("%s: column %s has what training had not (%s): it counts as unknown", where, name, some(new))
    return numeric, categorical


def one_hot(cells: Cells, categories: Mapping[str, list[str]], where: str) -> Array:
    """A 0 or 1 for each category, in the place of its column, as runs of version 0.1 had it.

    Raises:
        DataError: A cell is empty, or a category is unknown.
    """
    parts: list[Array] = []
    for name in cells.order or cells.numbers:
        if name not in categories:
            parts.append(cells.numbers[name])
            for row in np.flatnonzero(np.isnan(parts[-1])):
                raise DataError(f"{where} row {row}: column {name} is '', no number; mend or remove the row")
            continue
        codes, values = cells.texts[name]
        for row in np.flatnonzero(~np.isin(codes, [n for n, value in enumerate(values) if value in categories[name]])):
            raise DataError(
                f"{where} row {row}: column {name} is '{[*values, ''][codes[row]]}', no category that was there in "
                f"training ({', '.join(categories[name])}); mend or remove the row"
            )
        parts += [codes == (values.index(value) if value in values else -2) for value in categories[name]]
    return np.stack(parts, 1).astype(np.float32)


def numeric_names(columns: Columns) -> list[str]:
    """The names of the numeric columns that `encode` gives."""
    known = columns["numeric"]
    return [each["name"] for each in known] + [f"{each['name']} is missing" for each in known if each.get("gaps")]


def kinds_of(columns: Columns) -> str:
    """What the columns were read as, in a clause: `numbers a, b; dates day; categories job (3)`."""
    kinds = {
        "numbers": [each["name"] for each in columns["numeric"] if "of" not in each],
        "dates": list(dict.fromkeys(each["of"] for each in columns["numeric"] if "of" in each)),
        "categories": [f"{name} ({len(known)})" for name, known in columns["categorical"].items()],
    }
    kinds["numbers"] = [name for name in kinds["numbers"] if name not in kinds["dates"]]
    return "; ".join(f"{kind} {some(names)}" for kind, names in kinds.items() if names)


def some(names: Collection[str]) -> str:
    """Names for a message, the first of many."""
    return ", ".join(list(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
