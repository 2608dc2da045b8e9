"""Folders of images: layouts, decoding, classes."""

import logging

import numpy as np
import pytest
import torch
from conftest import image, make_tree
from PIL import Image

from datamodules import DataError, ImageFolders
from datamodules.decoding import ImageReader


def read_image(path, size, max_pixels=10**6):
    return ImageReader(size, size, "bilinear", max_pixels).read(path)


def sizes(data):
    return {split: len(data.domains(split)["target"]) for split in ("train", "val", "test")}


@pytest.mark.parametrize("val", ["val", "validation", "valid"])
def test_all_three_folders(val, tmp_path):
    data = ImageFolders(make_tree(tmp_path / "t", (("train", 5), (val, 3), ("test", 2))))
    assert sizes(data) == {"train": 15, "val": 9, "test": 6}
    assert data.class_names == ["blue", "green", "red"]


def test_without_a_test_folder_validation_serves_and_it_is_said(tree, caplog):
    data = ImageFolders(tree)
    with caplog.at_level(logging.WARNING):
        assert sizes(data) == {"train": 24, "val": 12, "test": 12}
    assert "no test split: `tl test` uses its validation split" in caplog.text


def test_without_a_val_folder_a_part_of_train_is_kept(tmp_path):
    data = ImageFolders(make_tree(tmp_path / "t", (("train", 10), ("test", 2))))
    assert sizes(data) == {"train": 24, "val": 6, "test": 6}
    train, val = (set(data.domains(s)["target"].ids) for s in ("train", "val"))
    assert not train & val


def test_class_folders_alone_are_split_in_three(tmp_path):
    data = ImageFolders(make_tree(tmp_path, (("pool", 10),)) / "pool")
    assert sizes(data) == {"train": 18, "val": 6, "test": 6}


def test_a_tree_with_only_a_test_folder_can_be_tested_but_not_trained_on(tmp_path):
    data = ImageFolders(make_tree(tmp_path / "t", (("test", 4),)), classes=["blue", "green", "red"])
    assert len(data.domains("test")["target"]) == 12
    with pytest.raises(DataError, match="no folder train"):
        data.domains("train")


def test_prediction_takes_any_folder(tmp_path):
    for name in ("b.png", "a.jpg", "deep/er/c.png"):
        image(tmp_path / "new" / name, (5, 5, 5))
    (tmp_path / "new" / "notes.txt").write_text("no image")
    data = ImageFolders(tmp_path / "new", classes=["x", "y"], image_size=16, num_workers=0)
    (batch,) = data.predict_dataloader()
    assert batch["target"][0].shape == (3, 3, 16, 16)
    assert [i.rpartition("new/")[2] for i in data.ids()] == ["a.jpg", "b.png", "deep/er/c.png"]


def test_two_domains(tree, tmp_path):
    data = ImageFolders(tree, make_tree(tmp_path / "s"))
    assert list(data.domains("train")) == ["source", "target"]


def test_decoding_scales_the_short_side_and_crops_the_centre(tmp_path):
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, 50:150] = 255  # the centre square is white
    Image.fromarray(pixels).save(tmp_path / "a.png")
    out = read_image(tmp_path / "a.png", 50, 10**6)
    assert out.shape == (3, 50, 50)
    assert out.dtype == torch.uint8
    assert out[:, :, 2:-2].min() > 250


def test_reduced_decoding_of_a_jpeg_stays_close_to_the_full_one(tmp_path):
    grid = np.stack(np.meshgrid(np.linspace(0, 255, 640), np.linspace(0, 255, 480)), -1)
    pixels = np.concatenate([grid, grid[..., :1]], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    reduced, full = (read_image(tmp_path / name, 64, 10**6).int() for name in ("a.jpg", "a.png"))
    assert (reduced - full).abs().max() <= 6


def test_exif_turns_the_image_upright(tmp_path):
    picture = Image.new("RGB", (20, 10))
    picture.paste((255, 0, 0), (0, 0, 10, 10))  # the left half is red
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned: the left is the top
    picture.save(tmp_path / "a.png", exif=exif)
    out = read_image(tmp_path / "a.png", 10, 10**6)
    assert out.shape == (3, 10, 10)
    image_ = Image.open(tmp_path / "a.png")
    assert image_.size == (20, 10)
    assert out[0, 0].min() > 200
    assert out[0, -1].max() < 50


def test_the_pixel_cap_is_checked_before_decoding(tmp_path, monkeypatch):
    image(tmp_path / "a.png", (1, 1, 1), size=(100, 100))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match="100 x 100 pixels are more than max_pixels 9999"):
        read_image(tmp_path / "a.png", 10, 9999)


def test_skip_leaves_bad_images_out(tree, caplog):
    (tree / "train" / "red" / "bad.png").write_bytes(b"x")
    data = ImageFolders(tree, on_bad_image="skip", image_size=16)
    with caplog.at_level(logging.WARNING):
        assert sizes(data)["train"] == 24
    assert "skipped 1 of 25 images" in caplog.text


@pytest.mark.parametrize("fractions", [(0, 0.2), (0.5, 0.5), (1.2, 0.1)])
def test_fractions_leave_something_to_train_on(tree, fractions):
    with pytest.raises(DataError, match="val_fraction"):
        ImageFolders(tree, val_fraction=fractions[0], test_fraction=fractions[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_kept_images_are_decoded_once(tree, workers):
    data = ImageFolders(tree, image_size=32, num_workers=workers, keep_decoded=True, batch_size=8)
    loader = data.train_dataloader()

    def epoch(number):
        for each in loader.flattened:
            each.sampler.set_epoch(number)
        batches = [batch["target"] for batch, _, _ in iter(loader)]
        x, y, _ = (torch.cat(part) for part in zip(*batches, strict=True))
        return sorted((int(label), int(image.long().sum())) for image, label in zip(x, y, strict=True))

    first = epoch(0)
    for file in tree.rglob("*.png"):
        file.unlink()
    assert epoch(1) == first
    data.teardown("fit")


def test_two_folders_of_one_split_are_refused(tmp_path):
    make_tree(tmp_path, (("train", 2), ("val", 2), ("valid", 2)))
    with pytest.raises(DataError, match="val and valid are both folders of val images"):
        ImageFolders(tmp_path)
