"""A table of images, texts and numbers: what a row becomes, splits, missing cells, and error messages."""

import re

import numpy as np
import pytest
import torch

from datamodules import DataError, Paired
from datamodules.augmentation import transforms_of

pytest.importorskip("polars")

HEADER = "picture,title,height,age,kind,split,who"
ROWS = [f"{i % 3}.png,plant {i},{i}.5,{i},{'tree' if i % 2 else 'rose'},,p{i // 4}" for i in range(24)]


def table(folder, rows=ROWS, name="t.csv", header=HEADER):
    path = folder / name
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.fixture
def plants(tmp_path):
    from PIL import Image

    for number in range(3):
        Image.fromarray(np.full((10, 12, 3), 40 * number, np.uint8)).save(tmp_path / f"{number}.png")
    return tmp_path


ALL = {"image": "picture", "text": "title", "numbers": ["height", "age"], "label": "kind", "image_size": 8}


def test_a_row_is_an_image_a_text_and_numbers(plants):
    data = Paired(target=table(plants), **ALL)
    assert data.schema == {
        "x": {"image": {"image": {}}, "text": {"text": {}}, "row": {"numeric": ["height", "age"]}},
        "y": {"classes": ["rose", "tree"]},
    }
    train = data.domains("train")["target"]
    x, y = train[0]
    row = int(train.ids[0])
    assert x["image"].shape == (3, 8, 8)
    assert int(x["image"][0, 0, 0]) == 40 * (row % 3)
    assert (x["text"], x["row"].tolist(), int(y)) == (f"plant {row}", [row + 0.5, row], row % 2)
    turned, _ = train.augmented(0, lambda image: image + 1)
    assert torch.equal(turned["image"], x["image"] + 1)
    assert turned["text"] == x["text"]
    sizes = [len(data.domains(split)["target"]) for split in ("train", "val", "test")]
    assert sum(sizes) == 24
    assert train.fingerprint() == Paired(target=plants / "t.csv", **ALL).domains("train")["target"].fingerprint()


def test_classes_are_called_as_the_table_calls_them(plants):
    rows = [row.replace("tree", "TRUE").replace("rose", "FALSE") for row in ROWS]
    assert Paired(target=table(plants, rows), **ALL).class_names == ["FALSE", "TRUE"]


def test_an_empty_cell_is_a_missing_input(plants):
    rows = [",plant,1.5,1,rose,,a", "0.png,,2.5,2,tree,,a", "0.png,plant,,3,rose,,a", "1.png,plant,1.5,1,tree,,a"]
    data = Paired(target=table(plants, rows * 3), **ALL)
    whole = data.predict_dataloader().dataset
    missing = [[name for name, part in whole[i][0].items() if part is None] for i in range(4)]
    assert missing == [["image"], ["text"], ["row"], []]
    without = Paired(target=plants / "t.csv", **ALL, without=["text"]).predict_dataloader().dataset
    assert all(without[i][0]["text"] is None for i in range(4))


def test_named_augmentations_are_of_the_image(plants):
    """Also if the first row has no image."""
    rows = [",plant,1.5,1,rose,train,a", "2.png,plant,2.5,2,tree,train,a", *("0.png,a,1.5,1,rose,val,a",) * 2]
    train = Paired(target=table(plants, rows), split="split", **ALL).domains("train")["target"]
    changed = transforms_of("light", train, "Paired")
    without, with_image = (train.augmented(row, changed)[0]["image"] for row in range(2))
    assert without is None
    assert with_image.shape == (3, 8, 8)


def test_one_input_alone_is_itself(plants):
    data = Paired(target=table(plants), text="title", label="height")
    assert data.schema == {"x": {"text": {}}, "y": {"values": 1}}
    x, y = data.domains("train")["target"][0]
    assert x.startswith("plant ")
    assert y.dtype == np.float32


def test_splits_and_groups_are_the_tables(plants):
    rows = [line.replace(",,", f",{'validation' if i % 4 == 0 else 'test' if i % 4 == 1 else 'train'},")
            for i, line in enumerate(ROWS)]  # fmt: skip
    data = Paired(target=table(plants, rows), split="split", **ALL)
    assert [len(data.domains(split)["target"]) for split in ("train", "val", "test")] == [12, 6, 6]
    data = Paired(target=table(plants), group="who", **ALL)
    groups = [set(data.domains(split)["target"].groups) for split in ("train", "val", "test")]
    assert len(set.union(*groups)) == sum(map(len, groups)) == 6


def test_images_of_an_array_and_two_domains(plants):
    images = np.arange(24, dtype=np.uint8).reshape(24, 1, 1, 1).repeat(4, 1).repeat(4, 2).repeat(3, 3)
    np.savez(plants / "a.npz", images=images)
    np.save(plants / "b.npy", images + 100)
    path = table(plants)
    options = {"text": "title", "label": "kind"}
    data = Paired(path, path, str(plants / "b.npy"), str(plants / "a.npz"), **options)
    for name, shift in (("source", 0), ("target", 100)):
        part = data.domains("train")[name]
        assert int(part[0][0]["image"][0, 0, 0]) == int(part.ids[0]) + shift
    assert data.labels_hidden()
    assert list(data.train_dataloader().iterables) == ["source", "target"]
    with pytest.raises(DataError, match=r"image: .*a.npz has 24 images, but the target's table has 4 rows"):
        Paired(table(plants, ROWS[:4], "few.csv"), image=str(plants / "a.npz"), **options)


@pytest.mark.parametrize(("options", "message"), [
    ({"image": None, "text": None, "numbers": None}, "image, text, numbers: name at least one column as input"),
    ({"text": "titel"}, "text: .*t.csv: there is no column titel (did you mean title?)"),
    ({"numbers": ["title"]}, "numbers: column title of .*t.csv is String, not numbers"),
    ({"label": "who", "kind": "values"}, "target: .*t.csv row 0: its label 'p0' is not a number; fix it, or pass --data.kind classes"),
    ({"label": "split"}, "target: .*t.csv row 0: its label split is missing; fill it in"),
    ({"classes": ["rose", "palm"]}, "classes: there is no class tree"),
    ({"split": "kind"}, "split: .*t.csv row 0: there is no split rose"),
    ({"without": ["sound"]}, "without: there is no removable input sound"),
    ({"val_fraction": 0.0}, "val_fraction, test_fraction: 0.0 and 0.2 must be above 0"),
])  # fmt: skip
def test_refusals(plants, options, message):
    with pytest.raises(DataError, match=re.escape(message).replace(r"\.\*", ".*")):
        Paired(target=table(plants), **(ALL | options))


def test_what_is_not_there_is_named(plants):
    with pytest.raises(DataError, match="row 0: there is no image"):
        Paired(target=table(plants, [ROWS[0].replace("0.png", "9.png"), ROWS[1]]), **ALL)
    with pytest.raises(DataError, match="row 1: its text is missing, and it has no other input"):
        Paired(target=table(plants, [ROWS[0], ROWS[1].replace("plant 1", "")]), text="title", label="kind")
    with pytest.raises(DataError, match="target: give a table"):
        Paired(text="title")
    with pytest.raises(DataError, match="all rows have the label rose"):
        Paired(target=table(plants, ROWS[::2]), **ALL)
