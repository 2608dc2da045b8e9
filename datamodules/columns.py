"""The columns of a table as numbers: their meaning is learnt from training rows, and is plain data that a run keeps.

number, truth value     float32; a gap becomes the column's mean; if training has gaps, a 0/1 column marks them
date                    days since 1970, and sine and cosine of the position in year and week, and of a time in the day
text                    a category, 1, 2, ...; a gap is the category ""; a text not seen in training is 0

    {"numeric": [{"name": "age", "mean": 38.6}, {"name": "debt", "mean": 7.1, "gaps": True}],
     "categorical": {"job": ["", "clerk"]}}

Numeric columns keep their order, categories are sorted by column name: a config keeps the order of lists only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.arrays import empty_array
from datamodules.errors import DataError
from datamodules.frames import DATE
from datamodules.splits import log

if TYPE_CHECKING:
    from polars import DataType, Expr, LazyFrame

Array = np.ndarray[Any, Any]
Columns = dict[str, Any]
BLOCK = 1 << 18  # rows encoded at a time
FEW_GAPS = 0.05  # below this share of gaps in the labelled rows, nothing can be learnt from them


@dataclass
class Cells:
    """The columns of one file, in compact form.

    Attributes:
        count: Number of rows, N.
        numbers: Float32 (N,) by column name; a gap is NaN.
        texts: Codes (N,) and the distinct texts, by column name; a gap is -1.
        dates: The date column that a numeric column was made from, by the numeric column's name.
        order: The columns in the file's order.
    """

    count: int
    numbers: dict[str, Array] = field(default_factory=dict)
    texts: dict[str, tuple[Array, list[str]]] = field(default_factory=dict)
    dates: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


def is_text(kind: DataType) -> bool:
    """Returns whether a column holds text."""
    import polars

    return kind == polars.String or isinstance(kind, polars.Categorical | polars.Enum)


def as_text(name: str, kind: DataType) -> Expr:
    """Converts a column to text, whole numbers without a point, so that 1.0 in one file equals 1 in another."""
    import polars

    column = polars.col(name)
    if not kind.is_float():
        return column.cast(polars.String)
    whole = column.cast(polars.Int64, strict=False)
    return polars.when(column == whole).then(whole.cast(polars.String)).otherwise(column.cast(polars.String))


def read_cells(frame: LazyFrame, count: int, texts: Collection[str], numbers: Collection[str], where: str) -> Cells:
    """Reads columns of `count` rows from a file, in batches, so that only the compact form is in memory.

    Raises:
        DataError: A column is neither number, date nor text, has text among its numbers, or is infinite.
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
                raise DataError(f"{where} row {rows.start + row}: column {name} is infinite; fix or remove it")
        for name, (column, _) in cells.texts.items():
            column[rows] = part[f"\0{name}"].to_numpy()
    for name in set(numbers) & {name for name, kind in kinds.items() if is_text(kind)}:
        lost = frame.select(polars.col(name).filter(numeric[name].is_null() & polars.col(name).is_not_null())).collect()
        if len(lost):
            cell = lost[name][0]
            if re.match(DATE, cell):
                raise DataError(
                    f"{where}: column {name} has {cell}, and no cell tells the order of day and month; write 2024-12-31"
                )
            raise DataError(f"{where}: column {name} has '{cell}', not a number; fix or remove the row")
    return cells


def _as_numbers(name: str, kind: DataType, where: str) -> dict[str, Expr]:
    """Returns the numeric columns that a number, a truth value or a date becomes."""
    import polars

    column = polars.col(name)
    if is_text(kind):
        return {name: column.cast(polars.String).cast(polars.Float64, strict=False)}
    if kind.is_numeric() or kind in (polars.Boolean, polars.Null):
        return {name: column.cast(polars.Float64)}
    if kind != polars.Date and kind != polars.Datetime:
        raise DataError(f"{where}: column {name} is {kind}, not a number, date or text; pass --data.drop+={name}")
    days = column.cast(polars.Datetime("ms")).cast(polars.Int64) / 86_400_000
    cycles = {"year": column.dt.ordinal_day() / 365.25, "week": column.dt.weekday() / 7}
    if kind == polars.Datetime:
        cycles["day"] = days % 1
    turns = {f"{name} in {n}": 2 * math.pi * share for n, share in cycles.items()}
    return {name: days} | {f"{n} {wave}": getattr(turn, wave)() for n, turn in turns.items() for wave in ("sin", "cos")}


def learn(
    tables: Sequence[Cells], rows: Sequence[Sequence[int] | Array], labelled: Collection[int], where: str
) -> Columns:
    """Learns what the columns are.

    Args:
        tables: The cells of each domain that training sees.
        rows: The training rows of each domain.
        labelled: Indices of the domains whose labels training sees.
        where: The data's name for messages.

    Raises:
        DataError: A text column has too many distinct texts for categories.
    """
    columns: Columns = {"numeric": [], "categorical": {}}
    for name in tables[0].numbers:
        date = {"of": tables[0].dates[name]} if name in tables[0].dates else {}
        parts = [cells.numbers[name][own] for cells, own in zip(tables, rows, strict=True)]
        there = np.concatenate([part[~np.isnan(part)] for part in parts])
        mean = float(there.mean(dtype=np.float64)) if len(there) else 0.0
        columns["numeric"].append({"name": name, "mean": mean} | date)
        gaps = np.mean([np.isnan(part).mean() for position, part in enumerate(parts) if position in labelled] or [0])
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
                f"{where}: column {name} has {len(found)} distinct texts in {count} rows, e.g. '{max(found)}', too "
                f"many for categories; leave it out, --data.drop+={name}, or write numbers without a unit (3.4) or "
                "dates (2024-12-31)"
            )
        columns["categorical"][name] = sorted(found)
    return columns


def encode(cells: Cells, columns: Columns, where: str) -> tuple[Array, Array]:
    """Returns numeric columns, float32 (N, D), and categories, int64 (N, K); warns of values that training lacked."""
    gaps = [known["name"] for known in columns["numeric"] if known.get("gaps")]
    categories = sorted(columns["categorical"].items())
    numeric = empty_array((cells.count, len(columns["numeric"]) + len(gaps)), np.float32)
    categorical = empty_array((cells.count, len(categories)), np.int64)
    numbers: dict[str, Array] = {}  # text code in the file -> category number
    unseen: dict[str, list[str]] = {}
    for name, known in categories:
        number = {value: n for n, value in enumerate(known, 1)}
        values = cells.texts[name][1] if name in cells.texts else []
        numbers[name] = np.array([*(number.get(value, 0) for value in values), number.get("", 0)])  # -1 is a gap
        if new := [value for value in values if value not in number]:
            unseen[name] = new
    for start in range(0, cells.count, BLOCK):
        rows = slice(start, start + BLOCK)
        for position, known in enumerate(columns["numeric"]):
            name, mean = known["name"], np.float32(known["mean"])
            column = cells.numbers[name][rows] if name in cells.numbers else np.float32(np.nan)
            missing = np.isnan(column)
            numeric[rows, position] = np.where(missing, mean, column)
            if known.get("gaps"):
                numeric[rows, len(columns["numeric"]) + gaps.index(name)] = missing
        for position, (name, _) in enumerate(categories):
            categorical[rows, position] = numbers[name][cells.texts[name][0][rows] if name in cells.texts else -1]
    for name, new in unseen.items():
        log.warning("%s: column %s has values not seen in training (%s): they count as unknown", where, name, some(new))
    return numeric, categorical


def row_keys(*tables: Array) -> Array:
    """Returns a hash of each row of tables with N rows, (N,) uint64; equal rows have equal hashes."""
    keys = np.zeros(len(tables[0]), np.uint64)
    generator = np.random.default_rng(0)
    for table in tables:
        bits = table.view(np.uint32 if table.dtype == np.float32 else np.uint64)
        factors = generator.integers(0, 2**64, table.shape[1], np.uint64)
        for start in range(0, len(keys), BLOCK >> 4):
            rows = slice(start, start + (BLOCK >> 4))
            keys[rows] += (bits[rows] * factors).sum(1)
    return keys


def one_hot(cells: Cells, categories: Mapping[str, list[str]], where: str) -> Array:
    """Returns a 0/1 column for each category, in the place of its column, as version 0.1 did.

    Raises:
        DataError: A cell is empty, or a category is unknown.
    """
    parts: list[Array] = []
    for name in cells.order or cells.numbers:
        if name not in categories:
            parts.append(cells.numbers[name])
            for row in np.flatnonzero(np.isnan(parts[-1])):
                raise DataError(f"{where} row {row}: column {name} is '', not a number; fix or remove the row")
            continue
        codes, values = cells.texts[name]
        for row in np.flatnonzero(~np.isin(codes, [n for n, value in enumerate(values) if value in categories[name]])):
            raise DataError(
                f"{where} row {row}: column {name} is '{[*values, ''][codes[row]]}', not one of the categories seen in "
                f"training ({', '.join(categories[name])}); fix or remove the row"
            )
        parts += [codes == (values.index(value) if value in values else -2) for value in categories[name]]
    return np.stack(parts, 1).astype(np.float32)


def names_of(columns: Columns) -> list[str]:
    """Returns the columns of a file that were learnt."""
    return [*dict.fromkeys(each.get("of", each["name"]) for each in columns["numeric"]), *columns["categorical"]]


def numeric_names(columns: Columns) -> list[str]:
    """Returns the names of the numeric columns that `encode` gives."""
    known = columns["numeric"]
    return [each["name"] for each in known] + [f"{each['name']} is missing" for each in known if each.get("gaps")]


def kinds_of(columns: Columns) -> str:
    """Describes the types of the columns for a message: `numbers a, b; dates day; categories job (3)`."""
    kinds = {
        "numbers": [each["name"] for each in columns["numeric"] if "of" not in each],
        "dates": list(dict.fromkeys(each["of"] for each in columns["numeric"] if "of" in each)),
        "categories": [f"{name} ({len(known)})" for name, known in columns["categorical"].items()],
    }
    kinds["numbers"] = [name for name in kinds["numbers"] if name not in kinds["dates"]]
    return "; ".join(f"{kind} {some(names)}" for kind, names in kinds.items() if names)


def some(names: Collection[str]) -> str:
    """Lists names for a message, the first five of many."""
    return ", ".join(list(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
