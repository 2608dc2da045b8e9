"""What a run keeps of its table: label, splits, types of columns; and later tables that differ."""

import pytest
from conftest import rows, table

from datamodules import DataError, TabularData


def test_a_later_table_has_its_label_by_name(write, caplog):
    """Whatever the order of its columns; without that column it is unlabelled, and no feature is taken for a label."""
    caplog.set_level("INFO", "datamodules")
    text = table(40, a=lambda i: i, b=lambda i: i % 7, y=lambda i: "np"[i % 2])
    data = TabularData(write(text))
    columns = data.columns
    assert "label: column y; --data.label chooses another" in caplog.text
    label = data.resolve({})["label"]
    assert label == "y"
    known = {"classes": data.class_names, "columns": columns, "label": label}
    other = TabularData(write(table(40, y=lambda i: "np"[i % 2], b=lambda i: i % 7, a=lambda i: i), "b.csv"), **known)
    assert [rows(other)[str(i)][1] for i in range(4)] == [0, 1, 0, 1]
    assert rows(other)["9"][0].tolist() == [9, 2]
    bare = write(table(40, b=lambda i: i % 7, a=lambda i: i), "c.csv")
    for label in ("y", -1):  # -1: a run of an earlier version
        later = TabularData(bare, **known | {"label": label})
        assert later.predict_dataloader().dataset[9][0].tolist() == [9, 2]
        assert f"c.csv has no labels for lack of a column {label}" in caplog.text
        with pytest.raises(DataError, match=f"has no labels for lack of a column {label}"):
            later.test_dataloader()


def test_a_label_without_a_header_stays_a_number(write):
    data = TabularData(write("\n".join(f"{i}.5,{i % 7},{'np'[i % 2]}" for i in range(40))))
    label = data.resolve({})["label"]
    assert label == 2
    known = {"classes": data.class_names, "columns": data.columns, "label": label}
    later = TabularData(write("\n".join(f"{i}.5,{i % 7}" for i in range(40)), "b.csv"), **known)
    assert later.predict_dataloader().dataset[9][0].tolist() == [9.5, 2]
    with pytest.raises(DataError, match="lacks columns of training, 1, and has no header that tells which"):
        TabularData(write("1.5\n2.5\n", "c.csv"), **known)


def test_a_run_keeps_the_name_of_its_label(ok, write, tmp_path):
    write(table(40, a=lambda i: i, b=lambda i: i % 7, y=lambda i: i * 2.5))
    ok("fit --model Regression --model.backbone TabularMLP --data TabularData --data.target a.csv --name r "
       "--trainer.max_epochs 1 --trainer.logger false")  # fmt: skip
    assert "label: y\n" in (tmp_path / "runs/r/version_0/config.yaml").read_text()
    write("b,a\n1,2\n3,4\n", "new.csv")
    ok("predict --run runs/r --data.target new.csv --out p.csv")
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 3


def test_a_target_without_the_label_is_unlabelled_beside_a_source(write):
    source = write(table(40, a=lambda i: i, y=lambda i: "np"[i % 2]), "s.csv")
    data = TabularData(write(table(40, a=lambda i: i), "t.csv"), source, label="y")
    assert data.domains("train")["target"].unlabelled
    with pytest.raises(DataError, match="label: there is no column y"):
        TabularData(source=write(table(40, a=lambda i: i), "t.csv"), label="y")


@pytest.mark.parametrize("label", ["y", -1, 2])
def test_a_column_of_splits(write, label):
    names = ["Train", "VALID", "test_set", "training"]
    text = table(
        40, a=lambda i: i, b=lambda i: i % 7, y=lambda i: ["TRUE", "FALSE"][i % 3 // 2], split=lambda i: names[i % 4]
    )
    data = TabularData(write(text), label=label)
    assert data.class_names == ["FALSE", "TRUE"]
    assert data.x_schema == {"numeric": ["a", "b"]}
    assert {split: len(data.domains(split)["target"]) for split in ("train", "val", "test")} == {
        "train": 20, "val": 10, "test": 10,
    }  # fmt: skip
    assert data.domains("val")["target"].ids[:2] == ["1", "5"]
    for argument in ("drop", "categorical"):
        apart = TabularData(write(text), label="y", **{argument: ["split"]})
        assert len(apart.domains("val")["target"]) == 8
        assert ("split" in apart.x_schema.get("categorical", {})) == (argument == "categorical")


def test_a_column_split_of_other_names_is_a_feature(write):
    text = table(40, a=lambda i: i, split=lambda i: ["left", "right"][i % 2], y=lambda i: i)
    assert TabularData(write(text)).x_schema == {"numeric": ["a"], "categorical": {"split": ["left", "right"]}}
    mixed = write(text.replace("left", "train"))
    with pytest.raises(DataError, match="column split has 'right' among names of splits; write train, val or test, or"):
        TabularData(mixed)


def test_a_table_of_other_columns_is_refused(write):
    columns = TabularData(
        write(table(40, a=lambda i: i, day=lambda i: f"2024-01-{i % 28 + 1:02}", y=lambda i: i))
    ).columns
    for text, match in [
        ("A,c\n1,2\n", "has none of the columns of training, a, day; it has A, c; rename them"),
        ("a,day\n1,45321\n", "column day has numbers, and training had dates; write dates, e.g. 2024-12-31"),
        ("a,day\n2024-01-01,2024-01-01\n", "column a has dates, and training had numbers; write numbers"),
    ]:
        with pytest.raises(DataError, match=match):
            TabularData(write(text, "b.csv"), label=None, columns=columns)
    assert len(TabularData(write("a,day\n1,\n", "b.csv"), label=None, columns=columns).x_schema["numeric"]) == 6


def test_later_categories_are_read_as_text(write):
    """Whatever the cells of a later file look like alone."""
    cells = {
        "c": ["1e5", "x9"],
        "d": ["TRUE", "maybe"],
        "e": ["2024-01-01", "never"],
        "f": ["1.50", "n1", "n2"],
        "g": ["NA", "EU", "-"],
    }
    made = {name: lambda i, own=own: own[i % len(own)] for name, own in cells.items()}
    text = table(60, a=lambda i: i, **made, z=lambda i: f"{i % 3}.0", day=lambda i: "01/02/2024", y=lambda i: i)
    apart = {"categorical": ["z", "day"], "missing": {"g": "-"}}
    columns = TabularData(write(text), **apart).columns
    assert columns["categorical"]["z"] == ["0", "1", "2"]
    alone = write("a,c,d,e,f,g,z,day\n1,1e5,TRUE,2024-01-01,1.50,NA,2.0,01/02/2024\n", "b.csv")
    later = TabularData(alone, label=None, columns=columns, **apart)
    x, _ = later.predict_dataloader().dataset[0][:2]
    expected = {"c": "1e5", "d": "TRUE", "day": "01/02/2024", "e": "2024-01-01", "f": "1.50", "g": "NA", "z": "2"}
    assert {name: known[n - 1] for (name, known), n in zip(sorted(columns["categorical"].items()), x["categorical"], strict=True)} == expected  # fmt: skip
