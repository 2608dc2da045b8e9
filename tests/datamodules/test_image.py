"""Folders of images: layouts, decoding, classes."""

import logging

import numpy as np
import pytest
import torch
from conftest import image, make_tree
from PIL import Image
from torchvision.transforms import v2

from datamodules import ClassSubset, DataError, Digits, ImageFolders, NoShift, SyntheticDomains
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
    data = ImageFolders(tree, image_size=32, num_workers=workers, keep_decoded=True, batch_size=8, augment="none")
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


def read(data, epoch=0):
    loader = data.train_dataloader()
    for each in loader.flattened:
        each.sampler.set_epoch(epoch)
    batches = [batch["target"] for batch, _, _ in iter(loader)]
    x, _, index = (torch.cat(part) for part in zip(*batches, strict=True))
    return {int(i): image for i, image in zip(index, x, strict=True)}


def wide(folder, length=120):
    """Images whose left and right ends are white and whose middle, the square of the short side, is black."""
    for label in ("a", "b"):
        for number in range(4):
            pixels = np.zeros((40, length, 3), np.uint8)
            pixels[:, : (length - 40) // 2] = pixels[:, (length + 40) // 2 :] = 255
            for split in ("train", "val"):
                (folder / split / label).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / split / label / f"{number}.png")
    return folder


@pytest.mark.parametrize("length", [80, 120])
@pytest.mark.parametrize("keep", [False, True])
def test_a_random_crop_sees_the_border_and_evaluation_the_middle(tmp_path, keep, length):
    tree = wide(tmp_path / "t", length)
    crop = v2.RandomCrop(20)
    data = ImageFolders(tree, image_size=20, augment=[crop], num_workers=0, keep_decoded=keep)
    seen = [image for epoch in range(4) for image in read(data, epoch).values()]
    assert max(image.float().mean() for image in seen) > 110
    (batch,) = next(iter(data.val_dataloader())).values()
    assert batch[0].shape == (8, 3, 20, 20)
    assert batch[0].float().mean() < 10  # scaling mixes the edges a little


class Look(torch.nn.Module):
    """Puts down the shapes that it sees."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        assert x.dtype == torch.uint8
        self.seen.append(tuple(x.shape))
        return x


def test_transforms_get_the_decoded_image_in_their_order(tmp_path):
    tree, before, after = wide(tmp_path / "t"), [], []
    data = ImageFolders(tree, image_size=16, augment=[Look(before), v2.CenterCrop(30), Look(after)], num_workers=0)
    assert {tuple(image.shape) for image in read(data).values()} == {(3, 16, 16)}
    assert set(before) == {(3, 40, 120)}
    assert set(after) == {(3, 30, 30)}


def test_a_transform_that_changes_nothing_gives_what_evaluation_sees(tree):
    for keep in (False, True):
        for resize in (32, 36):
            options = {"image_size": 32, "resize_size": resize, "num_workers": 0, "keep_decoded": keep}
            plain = read(ImageFolders(tree, augment="none", **options))
            same = read(ImageFolders(tree, augment=[torch.nn.Identity()], **options))
            assert plain.keys() == same.keys()
            assert all((plain[i].int() - same[i].int()).abs().max() <= 1 for i in plain)


@pytest.mark.parametrize("keep", [False, True])
def test_light_and_strong_give_other_images_each_epoch_and_the_same_in_a_rerun(tree, keep):
    for augment in ("light", "strong"):
        one, again = (
            ImageFolders(tree, image_size=32, augment=augment, num_workers=0, keep_decoded=keep) for _ in "ab"
        )
        first, second, third = read(one), read(one, 1), read(again)
        assert all(image.shape == (3, 32, 32) and image.dtype == torch.uint8 for image in first.values())
        assert all(not torch.equal(first[i], second[i]) for i in first)
        assert all(torch.equal(first[i], third[i]) for i in first)


WEIGHTS = {"image_size": 64, "resize_size": 72, "interpolation": "bicubic"}


@pytest.mark.parametrize(
    ("given", "defaults", "wanted"),
    [
        ({}, {}, (224, 224, "bilinear")),
        ({}, WEIGHTS, (64, 72, "bicubic")),
        ({"image_size": 48}, WEIGHTS, (48, 48, "bilinear")),  # what a number has always meant
        ({"image_size": 48, "resize_size": 50, "interpolation": "bicubic"}, WEIGHTS, (48, 50, "bicubic")),
        ({"interpolation": "bilinear"}, WEIGHTS, (64, 72, "bilinear")),
    ],
)
def test_sizes_are_those_of_the_weights_unless_given(tree, given, defaults, wanted):
    data = ImageFolders(tree, **given)
    data.split_domains("val")
    found = data.resolve(defaults)
    assert (found["image_size"], found["resize_size"], found["interpolation"]) == wanted
    assert data.split_domains("val")["target"][0][0].shape == (3, wanted[0], wanted[0])


def test_what_wraps_images_decides_with_them(tree):
    inner = ImageFolders(tree, num_workers=0)
    wrapped = ClassSubset(inner, target=["blue", "red"], augment="auto")
    assert wrapped.resolve(WEIGHTS) == {"augment": "light", "data": {"init_args": {**WEIGHTS, "augment": "light"}}}
    assert {image.shape for image in read(wrapped).values()} == {(3, 64, 64)}
    synthetic = SyntheticDomains(ImageFolders(tree, num_workers=0), {"a": NoShift(), "b": NoShift()}, target="a")
    synthetic.split_domains("train")
    assert synthetic.resolve(WEIGHTS)["augment"] == "none"
    assert synthetic.split_domains("train")["target"][0][0].shape == (3, 64, 64)


def test_only_photos_are_augmented_by_default():
    digits = Digits()
    assert digits.resolve({})["augment"] == "none"
    assert {type(loader.dataset.transform) for loader in digits.train_dataloader().flattened} == {type(None)}
    assert Digits(augment="light").train_dataloader().flattened[0].dataset.transform is not None


def test_a_frozen_backbone_sees_plain_images_unless_told_otherwise(tree):
    assert ImageFolders(tree).resolve({"augment": "none"})["augment"] == "none"
    assert "augment" not in ImageFolders(tree, augment="strong").resolve({"augment": "none"})
