"""Tables in any common format, read by polars; `read_frame` is the only function that opens them.

file -> delimiter and header (of text) -> typed columns; an empty cell is null
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.errors import DataError
from datamodules.packed import open_bytes, open_text, unpacked, unpacked_name
from datamodules.splits import SPLIT, log

if TYPE_CHECKING:
    from polars import DataFrame, LazyFrame

MISSING = ("", "?", "NA", "N/A", "NaN", "nan", "NULL", "null", "None")  # text that means a missing value
DELIMITERS = "\t;|,"  # in order of preference; the comma is last, since it may be decimal
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\r?\n', re.IGNORECASE)  # Excel's first line
UNCUT = "\x1f"  # the delimiter of a file with one column
EXAMINED = 100  # rows from which the format of a text file is inferred
MINUS = "\u2212"
GROUPED = r"^[+-]?((\d+|[1-9]\d{0,2}(%s\d{3})+)(%s\d*)?|%s\d+)([eE][+-]?\d+)?$"
SPACES = " '’\u00a0\u202f"  # also between thousands
COMMAS, POINTS = f"[,{SPACES}]", f"[.{SPACES}]"
THOUSANDS, DECIMAL_COMMA = GROUPED % (COMMAS, r"\.", r"\."), GROUPED % (POINTS, ",", ",")  # 1,234.5 and 1.234,5
CODE = r"^0\d+$"  # 02116 is not a quantity
UNITS = "%$€£¥"
UNIT = rf"^([+-]?)\s*[{UNITS}]\s*|\s*[{UNITS}]$"  # before or after a number
ISO = r"^(\d{4})([./-])(\d{1,2})[./-](\d{1,2})"  # 2024-12-31, 2024/12/31
DAY = r"^(\d{1,2})([./-])(\d{1,2})[./-](\d{4}),?"  # 31.12.2024, 31/12/2024 or 12/31/2024
DATE = r"^(\d{4}[./-]\d\d?[./-]\d\d?|\d\d?[./-]\d\d?[./-](\d\d|\d{4}))(,?[T ] *\d\d?:\d\d\S*( [AaPp][Mm])?)?$"  # any
QUANTITY = rf"^[+{MINUS}-]?(?:[{UNITS}] *)?({THOUSANDS[1:-1]}|{DECIMAL_COMMA[1:-1]})(?: *[{UNITS}])?$"


def read_frame(
    path: Path, where: str, texts: Collection[str] = (), names: Collection[int | str] | None = ()
) -> DataFrame:
    """Reads CSV, TSV and other delimited text, JSON, JSONL, parquet, Arrow (feather), or Excel (its first sheet).

    The suffix decides; any other file is text. A file packed by gzip, bzip2, xz or zip (one file) is unpacked in
    memory. Delimiter (the one that a first line sep=; names, or tab, semicolon, bar, comma) and header of text are
    found from its first lines: a header is text above numbers or dates, or, if everything is text, a first line without
    a number whose cells do not occur again below, or names like 2019 and label above numbers and classes. Without a
    header the names are "0", "1", ... Cells are stripped, and an empty cell is null; in a column whose other cells are
    numbers, dates, or true and false, NA, ? and the like (`MISSING`) are null too. Numbers may have thousands
    separators, a decimal comma, and all the same % or currency sign, which is dropped; numbers with a leading zero,
    e.g. 02116, are text. Dates are ISO, or begin with the day (31.12.2024), or with the month if cells like 12/31/2024
    show it; if none shows the order, they stay text. Times in several zones are converted to UTC.

    Args:
        path: The file.
        where: What messages call it, e.g. "target: wine.csv".
        texts: Columns of a text file that are left as they are, whatever they look like.
        names: Columns of a text file that name things, such as classes, by name or number: numbers, or else text as
            it is. None: all columns.

    Raises:
        DataError: polars is not installed, or the file cannot be read, is empty, has two columns of one name or a line
            with a different number of cells.
    """
    frame: DataFrame = scan_frame(path, where, texts, names).collect()
    return frame


def scan_frame(
    path: Path, where: str, texts: Collection[str] = (), names: Collection[int | str] | None = ()
) -> LazyFrame:
    """Returns the table as a lazy polars query, which can run in batches."""
    kind = unpacked_name(path.name).suffix.lower()
    try:
        import polars

        source = unpacked(path, where)
        if kind == ".json" and _is_array(source):
            frame = polars.read_json(source, infer_schema_length=None).lazy()
        elif kind in (".json", ".jsonl", ".ndjson"):
            frame = polars.scan_ndjson(source, infer_schema_length=None)
        elif kind == ".parquet":
            frame = polars.scan_parquet(source)
        elif kind in (".arrow", ".feather", ".ipc"):
            frame = polars.scan_ipc(source)
        elif kind in (".xlsx", ".xls", ".xlsb", ".ods"):
            frame = polars.read_excel(source, infer_schema_length=None).lazy()
        else:
            frame = _scan_text(source, where, texts, names)
        columns = frame.collect_schema()
        if not columns or frame.limit(1).collect(engine="streaming").is_empty():
            raise DataError(f"{where} has no rows")
        for name, column in columns.items():
            if isinstance(column, polars.List) and isinstance(column.inner, polars.Struct):
                raise DataError(f"{where} has its rows in a list {name}; save that list alone, [{{...}}, {{...}}]")
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{where} cannot be read as a table (not UTF-8 at byte {error.start}); save it so") from error
    except ModuleNotFoundError as error:
        raise DataError(f"{where}: it needs {error.name}: pip install 'lightning-transfer[tables]'") from error
    except Exception as error:  # from polars, or its Excel reader
        raise DataError(f"{where} cannot be read as a table ({(str(error) or 'empty').splitlines()[0]})") from error
    return frame


def _is_array(source: Path | bytes) -> bool:
    """Returns whether a JSON file is one array, and not an object per line."""
    with open_bytes(source) as file:
        return file.read(1024).lstrip()[:1] == b"["


def _scan_text(
    source: Path | bytes, where: str, texts: Collection[str], names: Collection[int | str] | None
) -> LazyFrame:
    import polars

    with open_text(source) as file:
        head = file.read(1 << 20)
    if re.match(r"\s*<(!doctype html|html)\b", head, re.IGNORECASE):
        raise DataError(f"{where} is a page of HTML, not a table; download the file itself")
    if "\r" in head and "\n" not in head:
        raise DataError(f"{where} ends its lines by \\r alone; save it with \\n")
    if named := SEPARATOR_LINE.match(head):
        head = head[named.end() :]
    separator = named[1] if named else _delimiter(head)
    rows = list(islice(_cut(head.splitlines(keepends=True), separator), EXAMINED))
    if not rows:
        raise DataError(f"{where} has no rows")
    header = _is_header(rows[0], rows[1:])
    if not header:
        header = _has_numbers_as_names(rows[0], rows[1:])
        told = "names the columns" if header else "is a row: there is no header, and columns have numbers from 0"
        log.info("%s: the first line, %s, %s", where, separator.join(rows[0])[:80], told)
    columns = [cell if header and cell else str(position) for position, cell in enumerate(rows[0])]
    for name, count in Counter(columns).items():
        if count > 1:
            nameless = f", as a column without a name is called by its number; name column {name}"
            advice = nameless if rows[0].count(name) < count else "; rename or remove all but one"
            raise DataError(f"{where} has {count} columns named {name}{advice}")
    blank = _check_lines(source, bool(named), separator, len(columns), where)
    frame = polars.scan_csv(
        source,
        skip_rows=bool(named),
        separator=separator,
        has_header=header,
        new_columns=columns,
        infer_schema=False,  # polars would read all lines at every query
    )
    frame = frame.filter(~polars.all_horizontal(polars.all().is_null())) if blank else frame
    frame = frame.with_columns(_plain(name) for name in columns if name in texts)
    width = len(columns)
    kept = [n for at, n in enumerate(columns) if names is None or {n, at, at - width} & {*names}]
    others = [name for name in columns if name != SPLIT]  # a negative number may leave out the column of splits
    kept += [name for at, name in enumerate(others, -len(others)) if at in (names or ())]
    return typed(frame, [name for name in columns if name not in texts], _decimal_comma(rows, separator, where), kept)


def _decimal_comma(rows: Sequence[Sequence[str]], separator: str, where: str) -> bool:
    """Returns whether commas are decimal: a cell shows it, or the delimiter is ; and no cell shows the opposite."""
    cells = [_bare(cell) for row in rows for cell in row if "," in cell]
    forms = {(_fits(THOUSANDS, cell), _fits(DECIMAL_COMMA, cell)): cell for cell in cells}
    untold = (True, True) in forms and (True, False) not in forms and (False, True) not in forms
    if untold:
        cell, point = forms[True, True], "." if separator == ";" else ""
        log.warning(
            "%s: %s is read as %s: no cell tells whether commas are decimal, as they are if ; delimits cells",
            where,
            cell,
            cell.replace(",", point),
        )
    return (False, True) in forms or (separator == ";" and untold)


def _bare(cell: str) -> str:
    """Drops the unit of a number, and writes its minus as a hyphen."""
    return re.sub(UNIT, r"\1", cell.replace(MINUS, "-"), count=1)


def _fits(form: str, cell: str) -> bool:
    return re.match(form, cell) is not None


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


def _has_numbers_as_names(first: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Returns whether a first line like 2019,2020,label names columns: its cells do not occur again, other texts do."""
    texts = 0
    for position, name in enumerate(first):
        column = [row[position] for row in rows if position < len(row) and row[position] not in MISSING]
        if (
            name in column
            or (name.isdecimal() and first.count(name) > 1)
            or (_is_number(name) and not name.isdecimal())
        ):
            return False
        if name and not name.isdecimal():
            texts += 1
            if len(set(column)) > len(column) / 2:
                return False
    return texts > 0


def _is_number(cell: str) -> bool:
    """Returns whether a cell is a number or a date."""
    return _is_quantity(cell) or re.match(f"{ISO}|{DAY}", cell) is not None


def _is_quantity(cell: str) -> bool:
    """Returns whether a cell is a number, perhaps with a unit."""
    cell = _bare(cell)
    try:
        float(cell)
    except ValueError:
        return _fits(THOUSANDS, cell) or _fits(DECIMAL_COMMA, cell)
    return True


def _check_lines(source: Path | bytes, skip: int, separator: str, width: int, where: str) -> bool:
    """Rejects a line with a different number of cells, which polars would pad; returns whether lines are empty."""
    mark, blank, odd = separator.encode(), False, False
    with open_bytes(source) as file:
        for line in islice(file, skip, None):
            if line.isspace():
                blank = True
            elif line.count(mark) != width - 1 or line.count(b'"') % 2:
                odd = True  # or a delimiter or line break inside quotes
                break
    if odd:
        with open_text(source) as text:
            lines = list[str]()  # of the current row, which quotes may spread over several

            def read() -> Iterator[str]:
                for line in islice(text, skip, None):
                    lines.append(line)
                    yield line

            reader = csv.reader(read(), delimiter=separator, skipinitialspace=True)
            for row in reader:
                if sum(line.count('"') for line in lines) % 2:
                    number = skip + reader.line_num - len(lines) + 1
                    raise DataError(f'{where} line {number} has a single "; write a mark like 5" as "5"""')
                lines.clear()
                blank |= not row
                if row and len(row) != width:
                    raise DataError(
                        f"{where} line {skip + reader.line_num} has {len(row)} cells, not {width} as the lines before"
                    )
    return blank


def typed(
    frame: LazyFrame, names: Collection[str], decimal_comma: bool = False, kept: Collection[str] = ()
) -> LazyFrame:
    """Strips text columns, and converts them to numbers, dates or booleans if all cells that are not missing are.

    Of the columns `kept`, dates and booleans stay text.
    """
    import polars

    kinds = frame.collect_schema()
    texts = [name for name in names if kinds.get(name) == polars.String]
    stripped = {name: polars.col(name).str.strip_chars() for name in texts}
    there = {name: polars.when(text.is_in(MISSING).not_()).then(text) for name, text in stripped.items()}
    first = frame.select(text.drop_nulls().first().alias(n) for n, text in there.items()).collect(engine="streaming")
    forms = {name: tries(there[name], first[name].item(), decimal_comma) for name in texts}
    found: dict[str, Any] = {}
    for some in (slice(0, 2), slice(2, None)):  # rare formats only for columns that no usual one fits
        left = {name: forms[name][some] for name in texts if name not in found and forms[name][some]}
        lost = frame.select(
            ((there[name].is_not_null() & value.is_null()).any() | there[name].str.contains(CODE).any()).alias(
                f"{name}/{number}"
            )
            for name, values in left.items()
            for number, value in enumerate(values)
        ).collect(engine="streaming")
        for name, values in left.items():
            fits = [value for number, value in enumerate(values) if not lost[f"{name}/{number}"].item()]
            cell = first[name].item() or ""
            if fits and name in kept and not _is_quantity(cell):
                found[name] = there[name]
            elif len(fits) == 1 or (fits and not re.match(DAY, cell)):  # two fit 01/02/2024
                found[name] = fits[0]
    return frame.with_columns(found.get(name, _plain(name)).alias(name) for name in texts)


def _plain(name: str) -> Any:
    """Strips a text column; an empty cell becomes null."""
    import polars

    text = polars.col(name).str.strip_chars()  # no `replace`: it would read the file at once
    return polars.when(text != "").then(text).alias(name)


def tries(text: Any, first: str | None, decimal_comma: bool = False) -> list[Any]:
    """Returns the conversions to try on a text column, judged by its first cell."""
    import polars

    if first is None:
        return [text]
    if not _is_number(first):
        truth = text.str.to_lowercase()
        known = first.lower() in ("true", "false")
        return [polars.when(truth.is_in(("true", "false"))).then(truth == "true")] if known else []
    if date := re.match(ISO, first):
        return _times(text if date[2] == "-" else text.str.replace(ISO, "${1}-${3}-${4}"), first)
    if date := re.match(DAY, first):
        form = DAY.replace("[./-]", re.escape(date[2]))
        orders = ["${4}-${3}-${1}"] + ["${4}-${1}-${3}"] * (date[2] != ".")
        return [_times(text.str.replace(form, order), first)[0] for order in orders]
    text = text.str.replace(MINUS, "-", literal=True)
    if unit := re.search(f"[{UNITS}]", first):
        form = UNIT.replace(f"[{UNITS}]", re.escape(unit[0]))  # the same in all cells
        text = polars.when(text.str.contains(form)).then(text.str.replace(form, "${1}"))
    point = text.str.replace_all(POINTS, "").str.replace(",", ".", literal=True)
    comma = polars.when(text.str.contains(DECIMAL_COMMA)).then(point)
    thousands = polars.when(text.str.contains(THOUSANDS)).then(text.str.replace_all(COMMAS, ""))
    floats = [comma, text, thousands] if decimal_comma else [text, thousands, comma]
    return [text.cast(polars.Int64, strict=False), *(form.cast(polars.Float64, strict=False) for form in floats)]


def _times(text: Any, first: str) -> list[Any]:
    """Returns the conversions of ISO text to dates, or to times if the first cell has a clock."""
    import polars

    if ":" not in first:
        return [text.str.to_date("%Y-%m-%d", strict=False)]
    time = text.str.replace("T", " ", literal=True).str.replace("Z$", "+00:00")
    clocks = ("%I:%M:%S %p", "%I:%M %p") if first[-1] in "mM" else ("%H:%M:%S%.f", "%H:%M")
    local = [time.str.to_datetime(f"%Y-%m-%d {clock}", strict=False) for clock in clocks]
    zoned = time.str.to_datetime("%Y-%m-%d %H:%M:%S%.f%z", strict=False, time_unit="us")
    return [polars.coalesce(local), zoned.dt.convert_time_zone("UTC").dt.replace_time_zone(None)]
