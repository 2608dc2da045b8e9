"""What the cells of a table mean: gaps among numbers, dates, signs, and names of classes."""

import csv

import pytest
import yaml

from datamodules import DataError, TabularData


def test_a_gap_that_is_named_leaves_numbers(write, caplog):
    table = "a,zip,day,y\n" + "".join(
        f"{'-' if i == 3 else i % 7},0211{i % 5},2024-01-0{1 + i % 9},{i % 2}.0\n" for i in range(60)
    )
    with pytest.raises(
        DataError, match=r"column a has '-' among numbers or dates; pass --data.missing.a '-' if it means a gap"
    ):
        TabularData(write(table))
    caplog.set_level("INFO", "datamodules")
    columns = TabularData(write(table), missing={"a": "-"}).columns
    assert [each["name"] for each in columns["numeric"]][:2] == ["a", "day"]
    assert columns["categorical"] == {"zip": ["02110", "02111", "02112", "02113", "02114"]}
    assert "read as numbers a; dates day; categories zip (5)" in caplog.text
    assert set(TabularData(write(table), categorical=["a"]).columns["categorical"]) == {"a", "zip"}


@pytest.mark.parametrize("day", ["01/02/2024", "31.12.24", "31/12/2024 01/13/2024"])
def test_dates_that_do_not_tell_their_order_are_refused(write, day):
    cells = day.split(" ")
    table = "a,day,y\n" + "".join(f"{i % 7},{cells[i % len(cells)]},{i}\n" for i in range(60))
    with pytest.raises(DataError, match=rf"column day has dates like {cells[0]}, .* write 2024-12-31, or pass --data"):
        TabularData(write(table))
    assert TabularData(write(table), drop=["day"]).columns["numeric"][0]["name"] == "a"
    assert list(TabularData(write(table), categorical=["day"]).columns["categorical"]["day"]) == sorted(cells)


def test_an_impossible_date_is_named(write):
    table = "a;day;y\n" + "".join(
        f"{i};{'30.02.2024' if i == 9 else f'{i % 28 + 1:02}.12.2024'};{i}\n" for i in range(60)
    )
    with pytest.raises(DataError, match=r"column day has 30.02.2024 among dates like 01.12.2024; correct it"):
        TabularData(write(table))


@pytest.mark.parametrize("cell", ["{i}.4 kg", "1:{i}", "{i}-Jan-2024"])
def test_cells_that_are_neither_numbers_nor_categories_are_named(write, cell):
    table = "a,b,y\n" + "".join(f"{i},{cell.format(i=i + 10)},{i}.5\n" for i in range(60))
    example = r"e.g. '\S.*', too many for categories; leave it out, --data.drop\+=b, or write numbers without a unit"
    with pytest.raises(DataError, match=example):
        TabularData(write(table)).schema  # noqa: B018


def test_labels_with_a_leading_zero_are_classes(write):
    assert TabularData(write("a,y\n" + "1,001\n2,002\n" * 20)).class_names == ["001", "002"]
    assert TabularData(write("a,y\n" + "1,01\n2,1\n" * 20)).class_names == ["01", "1"]


def test_later_dates_that_do_not_tell_their_order_are_refused(write):
    table = "a,day,y\n" + "".join(f"{i % 7},{i % 28 + 1:02}/02/2024,{i}\n" for i in range(60))
    columns = TabularData(write(table)).columns
    with pytest.raises(DataError, match="column day has 01/02/2024, and no cell tells the order of day and month"):
        TabularData(write("a,day\n1,01/02/2024\n", "b.csv"), label=None, columns=columns)


def test_a_gap_among_percentages_or_dates_is_asked_about(write):
    for column in ("{i}%", "$1,{i}00", "{i}.12.2024"):
        cells = ["-", *(column.format(i=i % 17 + 10) for i in range(60))]
        table = "a;b;y\n" + "".join(f"{i % 7};{cell};{i}\n" for i, cell in enumerate(cells))
        with pytest.raises(DataError, match="column b has '-' among numbers or dates"):
            TabularData(write(table))
        columns = TabularData(write(table), missing={"b": "-"}).columns
        assert not columns["categorical"]


@pytest.mark.parametrize("names", [("TRUE", "FALSE"), ("Yes", "no"), ("31.12.2024", "30.12.2024")])
def test_a_class_is_called_as_the_file_calls_it(ok, write, tmp_path, names):
    write("a,y\n" + "".join(f"{i % 7},{names[i % 2]}\n" for i in range(60)))
    ok(
        "fit --trainer.max_epochs 1 --model Classification --model.backbone TabularMLP --data TabularData --data.target a.csv --name r"
    )
    ok("predict --run runs/r")
    run = tmp_path / "runs/r/version_0"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["classes"] == sorted(names)
    with (run / "predictions.csv").open() as file:
        header, first, *_ = csv.reader(file)
    assert header == ["id", "label", *(f"p_{name}" for name in sorted(names))]
    assert first[1] in names
    ok("test --run runs/r")


def test_numbers_among_many_names_are_names(write):
    tickets = [f"PC {i % 9}" if i % 3 == 0 else f"{1000 + i % 10}" for i in range(60)]
    table = "ticket,x,y\n" + "".join(f"{ticket},{i}.5,{i % 2}.0\n" for i, ticket in enumerate(tickets))
    assert set(TabularData(write(table)).columns["categorical"]) == {"ticket"}


def test_a_run_keeps_what_a_gap_is_called(ok, write):
    write("a,b,y\n" + "".join(f"{i % 9},{'-' if i % 10 == 3 else i % 7},{'xy'[i % 2]}\n" for i in range(60)))
    model = "--trainer.max_epochs 1 --model Classification --model.backbone TabularMLP"
    ok(f"fit {model} --data TabularData --data.target a.csv --data.missing.b -")
    ok("predict --run runs/tabulardata --out p.csv")
