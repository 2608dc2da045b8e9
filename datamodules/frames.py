"""Tables in any common format, read by polars; `read_frame` is the only function that opens them.

file -> delimiter and header (of text) -> typed columns; an empty cell is null
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.errors import DataError

if TYPE_CHECKING:
    from polars import DataFrame, LazyFrame

MISSING = ("", "?", "NA", "N/A", "NaN", "nan", "NULL", "null", "None")  # text that means a missing value
DELIMITERS = "\t;|,"  # in order of preference; the comma is last, since it may be decimal
UNCUT = "\x1f"  # the delimiter of a file with one column
EXAMINED = 100  # rows from which the format of a text file is inferred


def read_frame(path: Path, where: str) -> DataFrame:
    """Reads CSV, TSV and other delimited text, JSONL, parquet, Arrow (feather), or Excel (its first sheet).

    The suffix decides; any other file is text. Delimiter (tab, semicolon, bar, comma) and header of text are found from
    its first lines: a header is text above numbers or dates, or, if everything is text, a first line without a number
    whose cells do not occur again below. Without a header the names are "0", "1", ... Cells are stripped, and an empty
    cell is null; in a column whose other cells are numbers, ISO dates, or true and false, NA, ? and the like
    (`MISSING`) are null too.

    Args:
        path: The file.
        where: What messages call it, e.g. "target: wine.csv".

    Raises:
        DataError: polars is not installed, or the file cannot be read, is empty, has two columns of one name or a line
            with a different number of cells.
    """
    frame: DataFrame = scan_frame(path, where).collect()
    return frame


def scan_frame(path: Path, where: str) -> LazyFrame:
    """Returns the table as a lazy polars query, which can run in batches."""
    kind = path.suffix.lower()
    try:
        import polars

        if kind in (".jsonl", ".ndjson"):
            frame = polars.scan_ndjson(path, infer_schema_length=None)
        elif kind == ".parquet":
            frame = polars.scan_parquet(path)
        elif kind in (".arrow", ".feather", ".ipc"):
            frame = polars.scan_ipc(path)
        elif kind in (".xlsx", ".xls", ".xlsb", ".ods"):
            frame = polars.read_excel(path, infer_schema_length=None).lazy()
        else:
            frame = _scan_text(path, where)
        columns = frame.collect_schema()
        if not columns or frame.limit(1).collect(engine="streaming").is_empty():
            raise DataError(f"{where} has no rows")
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{where} cannot be read as a table (not UTF-8 at byte {error.start}); save it so") from error
    except ModuleNotFoundError as error:
        raise DataError(f"{where}: it needs {error.name}: pip install 'lightning-transfer[tables]'") from error
    except Exception as error:  # from polars, or its Excel reader
        raise DataError(f"{where} cannot be read as a table ({(str(error) or 'empty').splitlines()[0]})") from error
    return frame


def _scan_text(path: Path, where: str) -> LazyFrame:
    import polars

    with path.open(newline="", encoding="utf-8-sig") as file:
        head = file.read(1 << 20)
    separator = _delimiter(head)
    rows = list(islice(_cut(head.splitlines(keepends=True), separator), EXAMINED))
    if not rows:
        raise DataError(f"{where} has no rows")
    header = _is_header(rows[0], rows[1:])
    names = (
        [cell or str(position) for position, cell in enumerate(rows[0])]
        if header
        else list(map(str, range(len(rows[0]))))
    )
    for name, count in Counter(names).items():
        if count > 1:
            raise DataError(f"{where} has {count} columns named {name}; rename or remove all but one")
    blank = _check_lines(path, separator, len(names), where)
    decimal_comma = separator == ";" and any(_is_number(c.replace(",", ".")) for row in rows for c in row if "," in c)
    frame = polars.scan_csv(
        path,
        separator=separator,
        has_header=header,
        new_columns=names,
        infer_schema=False,  # polars would read all lines at every query
    )
    frame = frame.filter(~polars.all_horizontal(polars.all().is_null())) if blank else frame
    return _typed(frame, decimal_comma)


def _cut(lines: Any, separator: str) -> Any:
    """Yields the rows of text that are not empty, with stripped cells."""
    for row in csv.reader(lines, delimiter=separator, skipinitialspace=True):
        if row:
            yield [cell.strip() for cell in row]


def _delimiter(head: str) -> str:
    """Finds the delimiter that cuts most of the first lines into the same number of cells, more than one."""
    shares = {}
    for mark in DELIMITERS:
        widths = Counter(map(len, islice(_cut(head.splitlines(keepends=True), mark), EXAMINED)))
        width, lines = widths.most_common(1)[0] if widths else (0, 0)
        shares[mark] = lines / widths.total() if width > 1 else 0.0
    best = max(shares, key=shares.__getitem__)
    return best if shares[best] else UNCUT


def _is_header(first: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Returns whether a first line names the columns of the rows below it."""
    columns = [[row[position] for row in rows if position < len(row)] for position in range(len(first))]
    for name, column in zip(first, columns, strict=True):
        values = [cell for cell in column if cell not in MISSING]
        if values and all(map(_is_number, values)) and name not in MISSING and not _is_number(name):
            return True
    again = any(name and name in column for name, column in zip(first, columns, strict=True))
    return not again and not any(map(_is_number, first)) and any(first)


def _is_number(cell: str) -> bool:
    """Returns whether a cell is a number or a date."""
    try:
        float(cell)
    except ValueError:
        try:
            datetime.fromisoformat(cell)
        except ValueError:
            return False
    return True


def _check_lines(path: Path, separator: str, width: int, where: str) -> bool:
    """Rejects a line with a different number of cells, which polars would pad; returns whether lines are empty."""
    mark, blank, odd = separator.encode(), False, False
    with path.open("rb") as file:
        for line in file:
            if line.isspace():
                blank = True
            elif line.count(mark) != width - 1:
                odd = True  # or a delimiter or line break inside quotes
                break
    if odd:
        with path.open(newline="", encoding="utf-8-sig") as text:
            reader = csv.reader(text, delimiter=separator, skipinitialspace=True)
            for row in reader:
                blank |= not row
                if row and len(row) != width:
                    raise DataError(
                        f"{where} line {reader.line_num} has {len(row)} cells, not {width} as the lines before"
                    )
    return blank


def _typed(frame: LazyFrame, decimal_comma: bool) -> LazyFrame:
    """Strips text columns, and converts them to numbers, dates or booleans if all cells that are not missing are."""
    import polars
    from polars import col

    texts = frame.collect_schema().names()
    stripped = {name: col(name).str.strip_chars() for name in texts}  # no `replace`: it would read the file at once
    plain = {name: polars.when(text != "").then(text) for name, text in stripped.items()}
    there = {name: polars.when(text.is_in(MISSING).not_()).then(text) for name, text in stripped.items()}
    first = frame.select(text.drop_nulls().first().alias(n) for n, text in there.items()).collect(engine="streaming")
    tries = {name: _tries(there[name], first[name].item(), decimal_comma) for name in texts}
    lost = frame.select(
        (there[name].is_not_null() & value.is_null()).any().alias(f"{name}/{number}")
        for name in texts
        for number, value in enumerate(tries[name])
    ).collect(engine="streaming")
    return frame.with_columns(
        next((v for n, v in enumerate(tries[name]) if not lost[f"{name}/{n}"].item()), plain[name]).alias(name)
        for name in texts
    )


def _tries(text: Any, first: str | None, decimal_comma: bool) -> list[Any]:
    """Returns the conversions to try on a text column, judged by its first cell."""
    import polars

    if first is None:
        return [text]
    if decimal_comma and _is_number(first.replace(",", ".")):
        first, text = first.replace(",", "."), text.str.replace(",", ".", literal=True)
    if not _is_number(first):
        truth = text.str.to_lowercase()
        known = first.lower() in ("true", "false")
        return [polars.when(truth.is_in(("true", "false"))).then(truth == "true")] if known else []
    if "-" in first[1:] and ":" not in first and "e" not in first.lower():
        return [text.str.to_date("%Y-%m-%d", strict=False)]
    if ":" in first:
        return [text.str.replace("T", " ", literal=True).str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False)]
    return [text.cast(polars.Int64, strict=False), text.cast(polars.Float64, strict=False)]
