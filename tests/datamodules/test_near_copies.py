"""Images, and rows of tables, that are in several splits without being the same file."""

import logging

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from datamodules import ImageFolders, TabularData, near_copies
from datamodules.near_copies import SIDE, find_near_copies


def photo(seed, size=(96, 72)):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8), np.uint8)
    return Image.merge("RGB", [Image.fromarray(noise // part) for part in (1, 2, 3)]).resize(
        size, Image.Resampling.BICUBIC
    )


@pytest.fixture
def folder(tmp_path):
    for number, (split, label) in enumerate((s, c) for s in ("train", "val", "test") for c in "ab" for _ in range(4)):
        path = tmp_path / split / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(number).save(path)
    return tmp_path


def test_images_of_several_splits_that_look_the_same_are_told(folder, caplog):
    caplog.set_level(logging.INFO)
    ImageFolders(folder).warn_of_copies()
    assert "look" not in caplog.text
    photo(0, (48, 36)).save(folder / "val/b/small.jpg", quality=80)
    photo(9, (288, 216)).save(folder / "test/b/large.jpg", quality=30)
    photo(0, (90, 70)).save(folder / "train/a/beside.jpg")  # of a0, in its own split, and of small.jpg
    (folder / "test/b/same.png").write_bytes((folder / "train/a/1.png").read_bytes())  # byte for byte
    (folder / "train/b/broken.jpg").write_bytes(b"nothing")
    ImageFolders(folder).warn_of_copies()
    assert caplog.text.count("3 pairs of images in different splits look the same, e.g. ") == 1
    assert caplog.text.count("1 files are in several splits, byte for byte") == 1
    assert "(val)" in caplog.text.partition("look the same")[2]


def pairs_of(images):
    thumbnails = {str(number): np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
                  for number, image in enumerate(images)}  # fmt: skip
    names = list(thumbnails)
    return find_near_copies({"train": names[::2], "test": names[1::2]}, thumbnails.__getitem__)[0]


def test_drawings_that_differ_in_little_are_not_told():
    digits = [Image.fromarray((16 * each).clip(0, 255).astype(np.uint8)) for each in load_digits().images[:600]]
    assert pairs_of(digits) == []
    plain = [Image.new("RGB", (40, 40), colour) for colour in ("white", "white", "navy", "black", "black")]
    assert pairs_of(plain) == []  # they have no edges
    discs = []
    for colour in ((250, 200, 60), (250, 160, 90)):  # emoji of two skins
        discs.append(Image.new("RGB", (40, 40), "white"))
        discs[-1].paste(colour, (10, 10, 30, 30))
    assert pairs_of(discs) == []
    assert len(pairs_of([discs[0], discs[0].resize((60, 60))])) == 1


def test_what_was_not_compared_is_told(folder, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(near_copies, "MOST", 10)
    ImageFolders(folder).warn_of_copies()
    assert "searched 10 of 24 images for those that look the same" in caplog.text
    monkeypatch.setattr(near_copies, "SECONDS", 0)
    ImageFolders(folder).warn_of_copies()
    assert "searched 0 of 24" in caplog.text


def test_rows_of_several_splits_are_told(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rows = [f"{i}.5,{'xyz'[i % 3]},{'pq'[i % 2]}" for i in range(40)]
    (tmp_path / "a.csv").write_text("a,b,y\n" + "\n".join(rows))
    TabularData(tmp_path / "a.csv").warn_of_copies()
    assert "same values" not in caplog.text
    (tmp_path / "a.csv").write_text("a,b,y\n" + "\n".join(rows * 5))
    data = TabularData(tmp_path / "a.csv")
    data.warn_of_copies()
    train, *others = (data.domains(split)["target"].ids for split in ("train", "val", "test"))
    known = {int(row) % 40 for row in train}
    count = sum(int(row) % 40 in known for part in others for row in part)
    assert f"{count} of {sum(map(len, others))} rows for validation and testing have the same values" in caplog.text
