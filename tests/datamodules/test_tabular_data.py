"""Tables from files, frames, arrays and embeddings."""

import numpy as np
import pytest
import torch
from conftest import rows, table

from datamodules import DataError, TabularData

WINE = "\n".join(f"{i % 7}.5,{i},{i % 3}" for i in range(30))
PEOPLE = """age;work;"income"
30;Private;high
40;State;low
35;?;low
50;Private;high
20;State;low
"""


def test_numbers_without_a_header(write):
    data = TabularData(write(WINE))
    assert data.schema == {"x": {"numeric": ["0", "1"]}, "y": {"values": 1}}
    assert [len(data.domains(s)["target"]) for s in ("train", "val", "test")] == [18, 6, 6]
    found = rows(data)
    assert sorted(map(int, found)) == list(range(30))
    x, y = found["9"]
    assert x.dtype == torch.float32
    assert x.tolist() == [2.5, 9.0]
    assert y == 0.0
    assert y.dtype == np.float32


def test_labels_by_number_and_as_classes(write):
    data = TabularData(write(WINE), label=0)
    assert rows(data)["9"][0].tolist() == [9.0, 0.0]
    assert rows(data)["9"][1] == 2.5
    data = TabularData(write(WINE), kind="classes")
    assert data.class_names == ["0", "1", "2"]
    assert rows(data)["4"][1] == 1
    assert np.bincount(data.domains("val")["target"].targets).tolist() == [2, 2, 2]


def test_whole_number_classes_are_in_the_order_of_the_numbers(write):
    assert TabularData(write(WINE), label=1, kind="classes").class_names == [str(i) for i in range(30)]


def test_a_threshold_makes_two_classes(write):
    data = TabularData(write(WINE), threshold=2)
    assert data.class_names == ["below 2", "from 2"]
    assert [rows(data)[str(i)][1] for i in range(3)] == [0, 0, 1]


def test_header_semicolons_text_and_categories(write):
    data = TabularData(write(PEOPLE + "\n".join(PEOPLE.splitlines()[1:] * 5)), label="income")
    assert data.class_names == ["high", "low"]
    assert data.schema["x"] == {"numeric": ["age"], "categorical": {"work": ["?", "Private", "State"]}}
    x, y = TabularData(write(PEOPLE), label="income").predict_dataloader().dataset[2][:2]
    assert (x["numeric"].tolist(), x["categorical"].dtype, y) == ([35], torch.int64, None)
    by_number = TabularData(write(PEOPLE), label=0)
    assert by_number.x_schema["categorical"].keys() == {"work", "income"}
    assert rows(by_number)["3"][1] == 50


def test_earlier_columns_of_0_and_1(write):
    """As a run of version 0.1 has them in its config."""
    categories = {"work": ["?", "Private", "State"]}
    data = TabularData(write(PEOPLE), label="income", categories=categories)
    assert data.schema["x"] == {"numeric": ["0", "1", "2", "3"]}
    assert data.categories == categories
    found = rows(data)
    assert found["2"][0].tolist() == [35, 1, 0, 0]
    assert found["0"][0].tolist() == [30, 0, 1, 0]
    other = write(PEOPLE.replace("?", "Self"))
    with pytest.raises(DataError, match="row 2: column work is 'Self', not one of the categories seen in training"):
        TabularData(other, label="income", categories=categories).schema  # noqa: B018
    empty = write(PEOPLE.replace("35", ""))
    with pytest.raises(DataError, match="row 2: column age is '', not a number"):
        TabularData(empty, label="income", categories=categories).schema  # noqa: B018


def test_categories_and_means_are_those_of_the_training_rows(write, caplog):
    text = table(40, a=lambda i: i, job=lambda i: f"job{i}" if i < 2 else "ab"[i % 2], y=lambda i: i % 2)
    data = TabularData(write(text), label="y", kind="classes")
    train = data.domains("train")["target"]
    ids = list(map(int, train.ids))
    known = sorted({f"job{i}" if i < 2 else "ab"[i % 2] for i in ids})
    assert data.x_schema["categorical"]["job"] == known
    assert data.columns["numeric"] == [{"name": "a", "mean": pytest.approx(np.mean(ids))}]
    later = TabularData(write(text.replace("b,1", "new,1"), "b.csv"), label="y", kind="classes", columns=data.columns)
    assert later.x_schema == data.x_schema
    assert caplog.text.count("column job has values not seen in training") == 1 + (len(known) < 4)
    whole = {row: x["categorical"].item() for row, (x, _) in rows(later).items()}
    assert {whole[str(i)] for i in range(3, 40, 2)} == {0}
    assert {whole[str(i)] for i in range(2, 40, 2)} == {known.index("a") + 1}


def test_an_adapted_to_target_without_splits_of_its_labels_teaches_its_categories(write):
    one = table(30, a=lambda i: i, job=lambda i: "ab"[i % 2], y=lambda i: i % 2)
    data = TabularData(write(one.replace("a,0", "c,0"), "t.csv"), write(one), kind="classes")
    assert data.x_schema["categorical"]["job"] == ["a", "b", "c"]
    unseen = TabularData(write(one.replace("a,0", "c,0"), "t.csv"), write(one), kind="classes", target_unseen=True)
    assert unseen.x_schema["categorical"]["job"] == ["a", "b"]


def test_gaps(write):
    text = table(
        100,
        a=lambda i: "" if i % 4 == 0 else i,
        b=lambda i: "NA" if i == 50 else 7,
        job=lambda i: "xy "[i % 3],
        y=lambda i: i,
    )
    data = TabularData(write(text), val_fraction=0.1)
    assert data.x_schema["numeric"] == ["a", "b", "a is missing"]
    assert data.x_schema["categorical"] == {"job": ["", "x", "y"]}
    mean = data.columns["numeric"][0]["mean"]
    found = {int(row): x for row, (x, _) in rows(data).items()}
    assert found[4]["numeric"].tolist() == pytest.approx([mean, 7, 1])
    assert found[50]["numeric"].tolist() == [50, 7, 0]
    assert found[5]["categorical"].item() == 1
    train = [int(row) for row in data.domains("train")["target"].ids]
    assert mean == pytest.approx(np.mean([row for row in train if row % 4]))
    zero = TabularData(write(table(40, a=lambda i: i % 4, y=lambda i: i)), missing={"a": 0})
    assert zero.x_schema["numeric"] == ["a", "a is missing"]


def test_gaps_that_only_an_unlabelled_target_has_are_no_column(write):
    """Nothing could be learnt of them."""
    source = table(40, a=lambda i: i, b=lambda i: i, y=lambda i: i)
    target = table(40, a=lambda i: i, b=lambda i: "" if i else 1, y=lambda i: i)
    assert TabularData(write(target, "t.csv"), write(source)).x_schema["numeric"] == ["a", "b"]
    opened = TabularData(write(target, "t.csv"), write(source), target_labels=True)
    assert opened.x_schema["numeric"] == ["a", "b", "b is missing"]


def test_booleans_dates_numbers_as_categories_and_dropped_columns(write):
    text = table(
        40,
        id=lambda i: f"row {i}",
        ok=lambda i: ["true", "false"][i % 2],
        day=lambda i: f"2024-01-{i % 28 + 1:02}",
        code=lambda i: [3, 7.0, 10][i % 3],
        y=lambda i: i,
    )
    data = TabularData(write(text), drop=["id"], categorical=["code"])
    waves = [f"day in {name} {wave}" for name in ("year", "week") for wave in ("sin", "cos")]
    assert data.x_schema == {"numeric": ["ok", "day", *waves], "categorical": {"code": ["10", "3", "7"]}}
    x = rows(data)["0"][0]  # 1 January 2024 was a Monday
    expected = [
        1,
        19723,
        *np.sin([2 * np.pi / 365.25, np.pi / 2 + 2 * np.pi / 365.25]),
        *np.sin([2 * np.pi / 7, np.pi / 2 + 2 * np.pi / 7]),
    ]
    assert x["numeric"].tolist() == pytest.approx(expected, abs=1e-6)
    assert x["categorical"].item() == 2
    lacking = write(
        "\n".join(line.split(",", 3)[1] + "," + line.split(",", 3)[3] for line in text.splitlines()), "b.csv"
    )
    later = TabularData(lacking, columns=data.columns)
    assert rows(later)["0"][0]["numeric"].tolist()[1] == pytest.approx(data.columns["numeric"][1]["mean"])
    assert TabularData(write(text), drop=[0, 2, 3]).x_schema == {"numeric": ["ok"]}


def test_columns_that_only_one_domain_has(write, caplog):
    caplog.set_level("INFO")
    source = write(table(30, a=lambda i: i, b=lambda i: i, y=lambda i: i), "s.csv")
    target = write(table(30, c=lambda i: i, b=lambda i: 2 * i, y=lambda i: i), "t.csv")
    data = TabularData(target, source)
    assert data.x_schema == {"numeric": ["b"]}
    assert caplog.text.count("the 1 columns that both have are used; only source has a; only target has c") == 1
    later = TabularData(target, columns=TabularData(source).columns)
    assert "lacks columns seen in training: a" in caplog.text
    assert rows(later)["3"][0].tolist()[1] == 6


def test_groups_are_not_torn_apart(write):
    data = TabularData(write(table(40, who=lambda i: i // 4, a=lambda i: i, y=lambda i: i)), group="who")
    assert data.x_schema == {"numeric": ["a"]}
    splits = [set(data.domains(split)["target"].groups) for split in ("train", "val", "test")]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 10


def test_frames(write):
    polars, pandas = pytest.importorskip("polars"), pytest.importorskip("pandas")
    columns = {"a": [1.5, None, 3.0] * 10, "job": ["x", "y", None] * 10, "y": list(range(30))}
    one, two = TabularData(polars.DataFrame(columns)), TabularData(pandas.DataFrame(columns))
    assert one.x_schema == two.x_schema == {"numeric": ["a", "a is missing"], "categorical": {"job": ["", "x", "y"]}}
    assert torch.equal(rows(one)["4"][0]["numeric"], rows(two)["4"][0]["numeric"])


def test_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", features=np.arange(20).reshape(10, 2), labels=np.arange(10) % 2)
    data = TabularData(tmp_path / "a.npz")
    assert data.x_schema == {"numeric": ["0", "1"], "one_unit": True}
    assert data.class_names == ["0", "1"]
    assert rows(data)["3"][0].tolist() == [6, 7]
    earlier = TabularData(tmp_path / "a.npz", categories={})  # as a run of version 0.1 has it
    assert earlier.x_schema == data.x_schema
    assert torch.equal(rows(earlier)["3"][0], rows(data)["3"][0])
    np.savez(tmp_path / "b.npz", features=np.zeros((10, 2)), labels=np.linspace(0, 1, 10))
    assert TabularData(tmp_path / "b.npz").class_names is None
    np.savez(tmp_path / "c.npz", features=np.zeros((10, 2)), labels=np.array(["x", "y"] * 5))
    assert TabularData(tmp_path / "c.npz").class_names == ["x", "y"]


def test_prediction_takes_all_rows_and_needs_no_labels(write, tmp_path):
    data = TabularData(write(PEOPLE), label="income")
    assert data.ids() != ["0", "1", "2", "3", "4"]
    rows_ = [row for batch in data.predict_dataloader() for row in batch["target"][2].tolist()]
    assert rows_ == [0, 1, 2, 3, 4]
    assert data.ids() == ["0", "1", "2", "3", "4"]
    unlabelled = "\n".join(line.rpartition(";")[0] for line in PEOPLE.splitlines())
    new = TabularData(write(unlabelled, "new.csv"), label=None, classes=data.class_names, columns=data.columns)
    assert len(new.class_names) == 2
    ((x, *_),) = [batch["target"] for batch in new.predict_dataloader()]
    assert x["numeric"][2].tolist() == [35]
    np.savez(tmp_path / "a.npz", features=np.zeros((10, 2)))
    assert len(next(iter(TabularData(tmp_path / "a.npz", label=None).predict_dataloader()))["target"][0]) == 10


def test_fingerprints_follow_contents(write):
    def fingerprint(text, **kwargs):
        return TabularData(write(text), **kwargs).domains("train")["target"].fingerprint()

    assert fingerprint(WINE) == fingerprint(WINE)
    assert len({fingerprint(WINE), fingerprint(WINE.replace("6.5,6", "6.6,6")), fingerprint(WINE, seed=1)}) == 3


def test_a_hidden_target_is_split_without_its_labels(write):
    other = "\n".join(line[:-1] + str(i // 10) for i, line in enumerate(WINE.splitlines()))
    one, two = (TabularData(write(text, "t.csv"), write(WINE), kind="classes") for text in (WINE, other))
    assert one.domains("val")["target"].ids == two.domains("val")["target"].ids


@pytest.mark.parametrize("format", ["safetensors", "npy"])
def test_embeddings(ok, tmp_path, format):
    ok(f"embed --data.source true --model.backbone.width 4 --out e --format {format}")
    data = TabularData(tmp_path / "e", tmp_path / "e")
    assert len(data.schema["x"]["numeric"]) == 16
    assert data.class_names == [str(digit) for digit in range(10)]
    from datamodules import Digits

    for split in ("train", "val", "test"):
        for name, dataset in Digits(source=True).domains(split).items():
            assert np.array_equal(data.domains(split)[name].targets, dataset.targets)
    alone = TabularData(tmp_path / "e")
    assert len(alone.domains("train")["target"]) == len(data.domains("train")["target"])


@pytest.mark.parametrize(
    ("text", "arguments", "match"),
    [
        ("", {}, "a.csv has no rows"),
        ("a b y\n1 2 3\n", {}, "a.csv has no column beside a b y; cells are delimited by tab, semicolon, bar or comma"),
        ("1,2\n3,4,5\n", {}, "a.csv line 2 has 3 cells, not 2"),
        ("a,a,y\n1,2,3\n", {}, "a.csv has 2 columns named a; rename"),
        ("1,inf,2\n1,3,4\n", {}, "row 0: column 1 is infinite; fix"),
        ("1,2\n1,\n", {}, "row 1: its label is missing; fill it in"),
        ("1,a\n1,NA\n", {}, "row 1: its label is missing"),
        ("1,2\n1,?\n", {}, "row 1: its label is missing"),
        ("1,2\n1,x\n", {"kind": "values"}, "row 1: its label 'x' is not a number; fix it, or pass --data.kind classes"),
        ("1,a\n1,b\n", {"threshold": 1}, "row 0: its label 'a' is not a number"),
        ("a,b\n1,2\n", {"missing": {"c": 0}}, "missing: there is no column c"),
        ("a,b\n1,2\n", {"drop": ["c"]}, "drop: there is no column c"),
        ("a,b\n1,2\n", {"drop": ["a"]}, "drop: .*a.csv has no other column beside the label"),
        ("a,b\n1,2\n", {"drop": [2]}, "drop: there is no column 2"),
        ("a,b\n1,2\n", {"categorical": ["c"]}, "categorical: there is no column c"),
        ("a,b\n1,2\n", {"group": "c"}, "group: there is no column c"),
        (
            "a,b\nx,2\n",
            {"columns": {"numeric": [{"name": "a", "mean": 0}], "categorical": {}}},
            "column a has 'x', not a number",
        ),
        ("1,2\n", {"label": "b"}, "label: .* has no header line"),
        ("a,b\n1,2\n", {"label": "bb"}, r"label: there is no column bb \(did you mean b\?\)"),
        ("1,2\n", {"label": 2}, "label: there is no column 2; .* has 2"),
        ("1,a\n2,a\n", {}, "all rows have the label a"),
        ("1,a\n2,b\n", {"classes": ["a", "c"]}, "classes: there is no class b"),
        ("\n".join(f"{i}:x,1" for i in range(40)), {}, "column 0 has 24 distinct texts in 24 rows"),
    ],
)
def test_mistakes(write, text, arguments, match):
    with pytest.raises(DataError, match=match):
        TabularData(write(text), **arguments).schema  # noqa: B018


def test_classes_of_one_row_each_cannot_be_split(write):
    data = TabularData(write("a,y\n" + "".join(f"{i},name {i}\n" for i in range(9))))
    with pytest.raises(DataError, match=r"no class has enough samples for a val split; .* whether the label is right"):
        data.val_dataloader()


def test_mistakes_of_files_and_domains(write, tmp_path):
    with pytest.raises(DataError, match="target: give a table"):
        TabularData()
    with pytest.raises(DataError, match="their columns differ: 2 and 1"):
        TabularData(write("1,2\n", "b.csv"), write("1,2,3\n"))
    with pytest.raises(DataError, match=r"their columns differ: \['a'\] and \['b'\]"):
        TabularData(write("b,y\n1,2\n", "b.csv"), write("a,y\n1,2\n"))
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(DataError, match=r"a.npz cannot be read as a table \(it has no "):
        TabularData(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", features=np.zeros(3), labels=np.zeros(3))
    with pytest.raises(DataError, match=r"have shapes \(3,\) and \(3,\), not \(N, D\)"):
        TabularData(tmp_path / "b.npz")
    with pytest.raises(DataError, match=r"is a folder without the index.csv of `tl embed`; name one table"):
        TabularData(tmp_path)
    (tmp_path / "c.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as a table"):
        TabularData(tmp_path / "c.csv")


def test_the_real_tables(data_dir):
    red, white = (data_dir / "tabular" / f"winequality-{colour}.csv" for colour in ("red", "white"))
    wine = TabularData(red, white)
    assert len(wine.schema["x"]["numeric"]) == 11
    assert len(rows(wine, "source")) == 4898
    assert len(TabularData(red, threshold=6).class_names) == 2
    adult = TabularData(data_dir / "tabular" / "adult-test.csv")
    assert adult.class_names == ["<=50K.", ">50K."]
    assert len(adult.schema["x"]["numeric"]) == 6
    assert len(adult.schema["x"]["categorical"]) == 8


def test_no_array_or_split_is_left_out_in_silence(tmp_path):
    rows, labels = np.zeros((6, 2), np.float32), np.arange(6) % 2
    np.savez(tmp_path / "a.npz", features=rows, labels=labels, test_features=rows, test_labels=labels)
    with pytest.raises(DataError, match="unknown array test_features"):
        TabularData(tmp_path / "a.npz")
    folder = tmp_path / "embedded"
    folder.mkdir()
    np.save(folder / "features.npy", rows)
    lines = "".join(f"{i},target,{'dev' if i else 'train'},{i},a\n" for i in range(6))
    (folder / "index.csv").write_text(f"row,domain,split,id,label\n{lines}")
    with pytest.raises(DataError, match="split: there is no split dev"):
        TabularData(folder)


def test_rows_have_no_named_augmentation(write):
    with pytest.raises(DataError, match="augment: light is for images"):
        TabularData(write(PEOPLE), augment="light").train_dataloader()
