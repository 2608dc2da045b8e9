"""Tables from CSV files, arrays and embeddings."""

import numpy as np
import pytest
import torch

from datamodules import DataError, TabularData

WINE = "\n".join(f"{i % 7}.5,{i},{i % 3}" for i in range(30))
PEOPLE = """age;work;"income"
30;Private;high
40;State;low
35;?;low
50;Private;high
20;State;low
"""


@pytest.fixture
def write(tmp_path):
    def call(text, name="a.csv"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return call


def rows(data, domain="target"):
    """All samples by id."""
    sets = [data.domains(split)[domain] for split in ("train", "val", "test")]
    return {d.ids[i]: d[i] for d in sets for i in range(len(d))}


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
    data = TabularData(write(PEOPLE), label="income")
    assert data.class_names == ["high", "low"]
    assert data.categories == {"work": ["?", "Private", "State"]}
    assert len(data.schema["x"]["numeric"]) == 4
    found = rows(data)
    assert found["2"][0].tolist() == [35, 1, 0, 0]
    assert found["0"][0].tolist() == [30, 0, 1, 0]
    assert found["0"][1] == 0
    by_number = TabularData(write(PEOPLE), label=0)
    assert by_number.categories == {"work": ["?", "Private", "State"], "income": ["high", "low"]}
    assert rows(by_number)["3"][1] == 50


def test_categories_of_both_domains_and_of_training(write):
    target, source = write(PEOPLE, "t.csv"), write(PEOPLE.replace("?", "Self"), "s.csv")
    data = TabularData(target, source, label="income")
    assert data.categories["work"] == ["?", "Private", "Self", "State"]
    assert rows(data, "source")["2"][0].tolist() == [35, 0, 0, 1, 0]
    assert data.labels_hidden()
    later = TabularData(target, label="income", categories=data.categories, classes=data.class_names)
    assert len(later.schema["x"]["numeric"]) == len(data.schema["x"]["numeric"])
    with pytest.raises(DataError, match="line 4: column work is 'Self', no category that was there in training"):
        TabularData(source, label="income", categories={"work": ["?", "Private", "State"]})


def test_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", features=np.arange(20).reshape(10, 2), labels=np.arange(10) % 2)
    data = TabularData(tmp_path / "a.npz")
    assert data.x_schema == {"numeric": ["0", "1"], "one_unit": True}
    assert data.class_names == ["0", "1"]
    assert rows(data)["3"][0].tolist() == [6, 7]
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
    new = TabularData(write(unlabelled, "new.csv"), label=None, classes=data.class_names, categories=data.categories)
    assert len(new.class_names) == 2
    ((x, *_),) = [batch["target"] for batch in new.predict_dataloader()]
    assert x[2].tolist() == [35, 1, 0, 0]
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
        ("1,2\n3,4,5\n", {}, "a.csv line 2 has 3 cells, not 2"),
        ("1,2\n,4\n", {}, "line 2: column 0 is '', no number; mend"),
        ("1,2\nNA,4\n", {}, "line 2: column 0 is 'NA', no number"),
        ("a,b\n1,2\nnan,4\n", {}, "line 3: column a is 'nan', no number"),
        ("x,1,2\n,1,4\n", {}, "line 2: column 0 is empty"),
        ("1,2\n1,\n", {}, "line 2: its label is empty"),
        ("1,2\n1,?\n", {}, r"line 2: its label '\?' is no number; mend it, or pass --data.kind classes"),
        ("1,a\n1,b\n", {"threshold": 1}, "line 1: its label 'a' is no number"),
        ("1,2\n", {"label": "b"}, "label: .* has no header line"),
        ("a,b\n1,2\n", {"label": "bb"}, r"label: there is no column bb \(did you mean b\?\)"),
        ("1,2\n", {"label": 2}, "label: there is no column 2; .* has 2"),
        ("1,a\n2,a\n", {}, "all rows have the label a"),
        ("1,a\n2,b\n", {"classes": ["a", "c"]}, "classes: there is no class b"),
        ("\n".join(f"{i}:x,1" for i in range(40)), {}, "column 0 has 40 texts in 40 rows"),
    ],
)
def test_mistakes(write, text, arguments, match):
    with pytest.raises(DataError, match=match):
        TabularData(write(text), **arguments)


def test_mistakes_of_files_and_domains(write, tmp_path):
    with pytest.raises(DataError, match="target: give a CSV file"):
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
    with pytest.raises(DataError, match="cannot be read as a table"):
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
    assert len(adult.schema["x"]["numeric"]) > 90


def test_no_array_or_split_is_left_out_in_silence(tmp_path):
    rows, labels = np.zeros((6, 2), np.float32), np.arange(6) % 2
    np.savez(tmp_path / "a.npz", features=rows, labels=labels, test_features=rows, test_labels=labels)
    with pytest.raises(DataError, match="test_features would not be read"):
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
