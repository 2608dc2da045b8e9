"""Files of all formats, and the form of text files."""

import bz2
import gzip
import lzma
import zipfile

import pytest

from datamodules import DataError
from datamodules.frames import read_frame

polars = pytest.importorskip("polars")


@pytest.fixture
def read(tmp_path):
    def call(text, name="a.csv"):
        (tmp_path / name).write_text(text)
        return read_frame(tmp_path / name, f"target: {name}")

    return call


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("a,b\n1,2\n\n3,4\n", {"a": [1, 3], "b": [2, 4]}),
        ("1,2\n3,4\n", {"0": [1, 3], "1": [2, 4]}),
        ("label,0,1\n5,3,4\n1,2,4\n", {"label": [5, 1], "0": [3, 2], "1": [4, 4]}),  # names that are numbers
        (",a\n0,3\n1,2\n", {"0": [0, 1], "a": [3, 2]}),
        ("film,mark\ngood one,pos\nbad,neg\n", {"film": ["good one", "bad"], "mark": ["pos", "neg"]}),
        ("good one,pos\nbad,neg\nwell,pos\n", {"0": ["good one", "bad", "well"], "1": ["pos", "neg", "pos"]}),
        ("x\tlabel\ngood, well\tpos\nbad\t neg\n", {"x": ["good, well", "bad"], "label": ["pos", "neg"]}),
        ("a|b\n1|2\n", {"a": [1], "b": [2]}),
        ("a;b\n1,5;2\n3,25;2\n", {"a": [1.5, 3.25], "b": [2, 2]}),  # decimal commas
        ("a\n1\n4\n", {"a": [1, 4]}),
        ('a,b\n1, x\n?,"y, z"\n', {"a": [1, None], "b": ["x", "y, z"]}),
        ("a,b\nNaN,NA\nnull,x\n", {"a": [None, None], "b": ["NA", "x"]}),
        ("a,b\nTrue,1e3\nfalse,\n", {"a": [True, False], "b": [1000.0, None]}),
        ('a,b\n1,"1,234.50"\n2,"12,000"\n3,900\n', {"a": [1, 2, 3], "b": [1234.5, 12000, 900]}),  # thousands
        ("a;b;c\n1.234,50;1.250;0,5\n900;12.000;,25\n", {"a": [1234.5, 900], "b": [1250, 12000], "c": [0.5, 0.25]}),
        ("a;b\n7.412;0.125\n3.150;0.250\n", {"a": [7.412, 3.15], "b": [0.125, 0.25]}),  # no comma, no thousands
        ("a;b\n1,234;2,500.5\n2,500;1\n", {"a": [1234, 2500], "b": [2500.5, 1]}),
        ('a,b\n"1,5",x\n"2,25",-\n', {"a": [1.5, 2.25], "b": ["x", "-"]}),  # decimal commas beside others
        ("a\tb\n1,5\t3\n2,25\t4\n", {"a": [1.5, 2.25], "b": [3, 4]}),
        ("a,b,c\n12%,$1,-€ 2\n3.5 %,$2,€3\nNA,-$3,€4\n", {"a": [12, 3.5, None], "b": [1, 2, -3], "c": [-2, 3, 4]}),
        ('a,b\n"$1,200",1.2e3\n"$2,000.5",7\n', {"a": [1200, 2000.5], "b": [1200, 7]}),
        ("a;b;c\n1 200;1\u202f234,5;1'000\n7;2,25;5\n", {"a": [1200, 7], "b": [1234.5, 2.25], "c": [1000, 5]}),
        ("a;b\n1.234,50 €;3\n7,1 €;4\n", {"a": [1234.5, 7.1], "b": [3, 4]}),
        ("a,b\n$5,5%\n€5,5\n", {"a": ["$5", "€5"], "b": ["5%", "5"]}),  # two units, or one that only some have
        ("sep=;\na;b\n1,5;x|y\n2;z|z\n", {"a": [1.5, 2], "b": ["x|y", "z|z"]}),  # Excel's first line
        ("\ufeffSEP=^\r\na^b\r\n1^x\r\n\r\n2^y\r\n", {"a": [1, 2], "b": ["x", "y"]}),
        ("zip,b\n02116,0\n21345,0.5\n", {"zip": ["02116", "21345"], "b": [0.0, 0.5]}),  # a code
        ("a,b\n1,\u22122.5\n\u2212€3,4\n", {"a": ["1", "\u2212€3"], "b": [-2.5, 4]}),  # U+2212, the sign of typesetters
        ("a\n\u22121\n\u22122\n", {"a": [-1, -2]}),
        ("2019,2020,y\n1,2,p\n3,4,n\n5,6,p\n7,8,n\n", {"2019": [1, 3, 5, 7], "2020": [2, 4, 6, 8], "y": [*"pnpn"]}),
        ("1,2,y\n1,2,p\n3,4,p\n", {"0": [1, 1, 3], "1": [2, 2, 4], "2": [*"ypp"]}),  # numbers that occur again
        ("1,2,y\n3,4,p\n5,6,n\n", {"0": [1, 3, 5], "1": [2, 4, 6], "2": [*"ypn"]}),  # texts that do not
    ],
)
def test_the_form_of_text(read, text, columns):
    assert read(text).to_dict(as_series=False) == columns


def test_what_cannot_be_known_of_text_is_told(read, caplog):
    caplog.set_level("INFO", "datamodules")
    read("1,2,p\n3,4,n\n")
    assert "a.csv: the first line, 1,2,p, is a row: there is no header, and columns have numbers from 0" in caplog.text
    read("2019,y\n1,p\n3,n\n5,p\n7,n\n", "b.csv")
    assert "b.csv: the first line, 2019,y, names the columns" in caplog.text
    assert read("a\tb\n1,111\t2,222\n", "c.csv")["a"].to_list() == [1111]
    assert "c.csv: 2,222 is read as 2222: no cell tells whether commas are decimal" in caplog.text
    assert read("a;b\n1,111;2,222\n", "d.csv")["a"].to_list() == [1.111]
    assert "d.csv: 2,222 is read as 2.222: no cell tells" in caplog.text
    caplog.clear()
    read("a;b\n1,111;2,2\n", "e.csv")
    assert not caplog.text


def test_dates(read):
    frame = read("a,b\n2024-01-31,2024-01-31T10:00:00\nNA,2024-02-01 11:30:00\n")
    assert frame.dtypes == [polars.Date, polars.Datetime]
    assert frame["a"].null_count() == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("2024-01-31 10:00", "2024-01-31T10:00:30"),
        ("2024-01-31T10:00:00.250", "2024-01-31 10:00:30.25"),
        ("2024-01-31T10:00:00Z", "2024-01-31T12:00:30+02:00"),
    ],
)
def test_times_however_iso_writes_them(read, first, second):
    frame = read(f"a,b\n{first},1\n{second},2\n,3\n")
    assert frame.dtypes[0] == polars.Datetime
    assert str(frame["a"][0]).startswith("2024-01-31 10:00:00")
    assert (frame["a"][1] - frame["a"][0]).total_seconds() == 30
    assert frame["a"].null_count() == 1


@pytest.mark.parametrize(
    ("first", "second", "times"),
    [
        ("31.12.2024", "1.2.2024", ["2024-12-31", "2024-02-01"]),
        ("01.02.2024", "02.03.2024", ["2024-02-01", "2024-03-02"]),  # dots: the day comes first
        ("31/12/2024", "1/2/2024", ["2024-12-31", "2024-02-01"]),
        ("01/02/2024", "12/31/2024", ["2024-01-02", "2024-12-31"]),
        ("2024/12/31", "2024/01/02", ["2024-12-31", "2024-01-02"]),
        ("31-12-2024 14:30", "01-02-2024 07:00:30", ["2024-12-31 14:30:00", "2024-02-01 07:00:30"]),
        ("12/31/2024 2:30:00 PM", "1/2/2024 11:00 AM", ["2024-12-31 14:30:00", "2024-01-02 11:00:00"]),
        ("01/02/2024", "03/04/2024", None),
        ("13/01/2024", "01/13/2024", None),
        ("31.12.24", "30.12.24", None),
    ],
)
def test_dates_as_people_write_them(read, first, second, times):
    frame = read(f"a,b\n{first},1\n{second},2\n,3\n")
    assert list(map(str, frame["a"].head(2))) == (times or [first, second])
    assert frame["a"].dtype.is_temporal() == bool(times)


def test_names_are_numbers_or_text_as_it_is(tmp_path):
    (tmp_path / "a.csv").write_text("a,b,c,d\nTRUE,31.12.2024,1.50,no\nFALSE,30.12.2024,NA,yes\n")
    frame = read_frame(tmp_path / "a.csv", "w", names=["a", 1, -2])
    assert frame.rows() == [("TRUE", "31.12.2024", 1.5, "no"), ("FALSE", "30.12.2024", None, "yes")]
    assert read_frame(tmp_path / "a.csv", "w", names=None).equals(frame)


def test_columns_that_are_text_whatever_they_look_like(tmp_path):
    (tmp_path / "a.csv").write_text("text,n\n 007,1\nTRUE,2\n2024-01-01,3\n,4\n")
    frame = read_frame(tmp_path / "a.csv", "w", ["text"])
    assert frame.to_dict(as_series=False) == {"text": ["007", "TRUE", "2024-01-01", None], "n": [1, 2, 3, 4]}


def test_other_formats(read, tmp_path):
    frame = polars.DataFrame({"a": [1, None], "b": ["x", "y"]})
    frame.write_parquet(tmp_path / "a.parquet")
    frame.write_ipc(tmp_path / "a.feather")
    for name in ("a.parquet", "a.feather"):
        assert read_frame(tmp_path / name, "w").equals(frame)
    lines = '{"a": 1, "b": "x"}\n{"a": null, "b": "y"}\n'
    for text, name in ((lines, "a.jsonl"), (lines, "a.json"), (f"[{lines.strip().replace(chr(10), ',')}]", "b.json")):
        assert read(text, name).equals(frame)


def zipped(content):
    with zipfile.ZipFile(path := "packed.zip", "w") as archive:
        archive.writestr("__MACOSX/._a.csv", "litter")
        archive.writestr("folder/a.csv", content)
    with open(path, "rb") as file:
        return file.read()


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".XZ", lzma.compress), (".zip", zipped), ("", gzip.compress)],
)
def test_packed_tables(tmp_path, monkeypatch, suffix, pack):
    monkeypatch.chdir(tmp_path)
    frame = polars.DataFrame({"a": [1, None], "b": ["x", "y"]})
    frame.write_parquet("a.parquet")
    contents = {"a.csv": b"a,b\n1,x\n,y\n", "a.jsonl": b'{"a": 1, "b": "x"}\n{"a": null, "b": "y"}\n'}
    for name, content in (contents | {"a.parquet": (tmp_path / "a.parquet").read_bytes()}).items():
        if suffix or name == "a.csv":  # some call a packed file .csv
            (tmp_path / f"{name}{suffix}").write_bytes(pack(content))
            assert read_frame(tmp_path / f"{name}{suffix}", "w").equals(frame)


def test_packed_files_that_are_no_table(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"a,b\n1,x\n")[:-9])
    with pytest.raises(DataError, match=r"w cannot be read as a table .Compressed file ended before"):
        read_frame(tmp_path / "a.csv.gz", "w")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.csv", "1,2")
        archive.writestr("b.csv", "1,2")
    with pytest.raises(DataError, match="w holds 2 files, not one table; unpack it"):
        read_frame(tmp_path / "a.zip", "w")


def test_excel(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    pytest.importorskip("fastexcel")
    book = openpyxl.Workbook()
    for row in (("a", "b"), (1, "x"), (None, "y")):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    assert read_frame(tmp_path / "a.xlsx", "w").rows() == [(1, "x"), (None, "y")]


@pytest.mark.parametrize(
    ("text", "name", "match"),
    [
        ("", "a.csv", "target: a.csv has no rows"),
        ("a,b\n", "a.csv", "has no rows"),
        ("1,2\n3,4,5\n", "a.csv", "line 2 has 3 cells, not 2"),
        ("sep=,\na,b\n3\n", "a.csv", "line 3 has 1 cells, not 2"),
        ("a,b\n1,2\n3\n", "a.csv", "line 3 has 1 cells, not 2"),
        ("a,b,a\n1,2,3\n", "a.csv", "has 2 columns named a"),
        ("a,b\r1,2\r3,4\r", "a.csv", r"a.csv ends its lines by \\r alone; save it with \\n"),
        ("a,,1,y\n1,2,3,4\n", "a.csv", "has 2 columns named 1, as a column without a name is called by its number"),
        ('a,b\n1,x\n2,5" disc\n3,y\n', "a.csv", 'line 3 has a single "; write a mark like 5'),
        ('a,b\n1,"x\ny"\n3,"y\n', "a.csv", "line 4 has a single"),
        ("<!DOCTYPE html>\n<p>a, b</p>\n", "a.csv", "a.csv is a page of HTML, not a table; download the file itself"),
        ('{"data": [{"a": 1}, {"a": 2}]}', "a.json", "a.json has its rows in a list data; save that list alone"),
        ("nothing", "a.parquet", "a.parquet cannot be read as a table"),
        ("nothing", "a.arrow", "a.arrow cannot be read as a table"),
        ("nothing", "a.xlsx", "a.xlsx cannot be read as a table"),
        ("nothing", "a.jsonl", "a.jsonl cannot be read as a table"),
    ],
)
def test_mistakes(read, text, name, match):
    with pytest.raises(DataError, match=match):
        read(text, name)


def test_text_of_another_encoding(tmp_path):
    (tmp_path / "a.csv").write_bytes("a,b\nä,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 at byte 4"):
        read_frame(tmp_path / "a.csv", "w")


def test_without_polars(read, monkeypatch):
    import builtins

    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("polars"):
            raise ModuleNotFoundError(name="polars")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(DataError, match=r"it needs polars: pip install 'lightning-transfer\[tables\]'"):
        read("1,2\n")
