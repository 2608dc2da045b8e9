"""Folders as the world brings them: litter, links, names of splits, copies, images without labels."""

import logging
import os
import re
import shutil
import socket
import subprocess

import numpy as np
import pytest
from conftest import image, make_tree
from PIL import Image

from datamodules import (
    AudioFolders,
    ClassSubset,
    DataError,
    DomainFolders,
    ImageArrays,
    ImageFolders,
    NoShift,
    SyntheticDomains,
    TextFiles,
)
from datamodules.files import Paths, find_copies
from datamodules.folders import files_below, split_folders
from datamodules.splits import split_of

CLASSES = ("blue", "red")


def tree(root, *splits):
    return make_tree(root / "t", splits or (("train", 8), ("val", 4)), CLASSES)


def folders(root, **options):
    return ImageFolders(root, image_size=16, num_workers=0, **options)


def sizes(data):
    return [len(data.domains(split)["target"]) for split in ("train", "val", "test")]


@pytest.mark.parametrize("where", ["", "train", "train/red", "val/red"])
@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints/0.png", "._0.png", "__MACOSX/a/._0.png", ".DS_Store", "Thumbs.db"]
)
def test_litter_is_left_out_at_every_level(name, where, tmp_path, caplog):
    root = tree(tmp_path)
    file = root / where / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"no image")
    data = folders(root)
    assert (data.class_names, sizes(data)) == (list(CLASSES), [16, 8, 8])
    assert "left out" not in caplog.text
    assert "__MACOSX" not in folders(root / "train").class_names


def test_litter_is_no_domain_no_text_and_no_recording(tmp_path):
    make_tree(tmp_path, (("a", 2), ("b", 2)), CLASSES)
    shutil.copytree(tmp_path / "a", tmp_path / "__MACOSX")
    assert set(DomainFolders(tmp_path, target="a").roots) == {"source", "target"}
    for name in ("texts/x/1.txt", "texts/y/1.txt", "texts/__MACOSX/._1.txt", "texts/x/Thumbs.db"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("some words")
    assert TextFiles(tmp_path / "texts").class_names == ["x", "y"]
    assert list(files_below(tmp_path / "texts")) == ["x/1.txt", "y/1.txt"]


def test_files_that_are_not_read_are_counted_and_told_once(tmp_path, caplog):
    root = tree(tmp_path)
    for name in ("notes.txt", "train/red/1.xcf", "labels/a.csv"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    image(root / "train" / "loose.png", (9, 9, 9))
    data = folders(root)
    assert sizes(data) == [16, 8, 8]
    data.resolve({"image_size": 32})
    sizes(data)
    assert caplog.text.count("left out 3 files that are not images, or not in a split folder, e.g. labels/a.csv") == 1
    assert "left out 1 images in no class folder" in caplog.text


@pytest.mark.parametrize("suffix", ["jfif", "JPG", "jpe", "tiff", "webp", "jp2", "tga"])
def test_whatever_pillow_reads_is_an_image(suffix, tmp_path):
    assert sizes(folders(make_tree(tmp_path, classes=CLASSES, suffix=suffix))) == [16, 8, 8]


def test_links_are_followed_and_a_circle_is_no_trap(tmp_path):
    root = tree(tmp_path)
    (root / "train" / "red").rename(tmp_path / "elsewhere")
    (root / "train" / "red").mkdir()
    (root / "train" / "red" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root / "train")
    (root / "test").symlink_to(root / "val")
    data = folders(root)
    assert sizes(data)[1:] == [8, 8]
    assert {path.partition("train/")[2] for path in data.domains("train")["target"].ids} == {
        *(f"blue/{i}.png" for i in range(8)),
        *(f"red/more/{i}.png" for i in range(8)),
    }


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *((name, "train") for name in ("Train", "TRAIN", "training", "training_set", "train ")),
        *((name, "val") for name in ("Val", "valid", "VALIDATION", "dev", "val-set")),
        *((name, "test") for name in ("Testing", "test_images", "TestSet")),
        *((name, None) for name in ("trainer", "retest", "value", "contest", "trainee", "")),
    ],
)
def test_names_of_splits_as_people_write_them(name, split):
    assert split_of(name) == split


def test_split_folders_and_keys_as_people_write_them(tmp_path):
    root = tree(tmp_path, ("Training", 8), ("VALID", 4), ("Testing", 2))
    data = folders(root)
    assert (data.class_names, sizes(data)) == (list(CLASSES), [16, 8, 4])
    arrays = {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.arange(4) % 2}
    np.savez(tmp_path / "a.npz", **{f"{s}_{k}": v for s in ("Training", "Test") for k, v in arrays.items()})
    assert len(ImageArrays(tmp_path / "a.npz").domains("test")["target"]) == 4
    for split in ("Training", "Testing"):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{split}.csv").write_text("text,label\n" + "good,x\nbad,y\n" * 5)
    assert len(TextFiles(tmp_path / "texts").domains("test")["target"]) == 10


def test_which_folder_is_a_split_and_which_a_class(tmp_path):
    vehicles = make_tree(tmp_path / "x", (("vehicles", 5),), ("car", "plane", "train"))
    assert folders(vehicles / "vehicles").class_names == ["car", "plane", "train"]
    mixed = make_tree(tmp_path / "y", (("mixed", 5),), ("cat", "dog", "test")) / "mixed"
    with pytest.raises(DataError, match="test look like splits and cat, dog like classes"):
        split_folders(mixed)
    assert set(split_folders(tree(tmp_path))) == {"train", "val"}


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_that_ends_up_empty_in_a_split_is_refused(tmp_path, split):
    root = tree(tmp_path)
    for file in (root / split / "red").iterdir():
        file.write_bytes(b"no image")
    empty = rf"class red is empty: none of its images can be read, e.g. .*/{split}/red/0.png"
    with pytest.raises(DataError, match=empty):
        folders(root, on_bad_image="skip").domains("train")


def test_pipes_and_sockets_are_no_images(tmp_path, caplog, monkeypatch):
    root = tree(tmp_path)
    os.mkfifo(root / "train" / "red" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as opened:
        monkeypatch.chdir(root / "train" / "red")  # the path of a socket is short
        opened.bind("socket.png")
    (root / "val" / "red" / "broken.png").symlink_to("nowhere.png")
    data = folders(root)
    assert sizes(data)[:2] == [16, 9]
    assert "left out 2 pipes, sockets or devices, e.g. train/red/pipe.png" in caplog.text
    with pytest.raises(DataError, match=r"broken\.png: it cannot be"):
        data.domains("val")["target"][8]


def test_copies_across_splits_are_told(tmp_path, caplog):
    root = tree(tmp_path)
    for i in range(2):
        shutil.copy(root / "train" / "red" / f"{i}.png", root / "val" / "red" / f"copy{i}.png")
    data = folders(root)
    data.setup("predict")
    assert "byte for byte" not in caplog.text
    data.setup("fit")
    assert caplog.text.count("2 files are in several splits, byte for byte, e.g. ") == 1
    assert f"{root}/train/red/0.png (train) and {root}/val/red/copy0.png (val)" in caplog.text


def test_copies_across_classes_are_told(tmp_path, caplog):
    root = tree(tmp_path)
    folders(root).warn_of_copies()
    assert "several classes" not in caplog.text
    for i in range(3):
        shutil.copy(root / "train" / "red" / f"{i}.png", root / "train" / "blue" / f"copy{i}.png")
    shutil.copy(root / "train" / "red" / "4.png", root / "train" / "red" / "twice.png")
    folders(root).warn_of_copies()
    assert caplog.text.count("3 files are in several classes of a split, byte for byte, e.g. ") == 1
    assert f"{root}/train/blue/copy0.png (blue) and {root}/train/red/0.png (red): one label is wrong" in caplog.text
    assert "several splits" not in caplog.text
    shutil.copy(root / "train" / "red" / "0.png", root / "val" / "red" / "copy.png")
    folders(root).warn_of_copies()
    assert "1 files are in several splits, byte for byte" in caplog.text


def test_unknown_classes_can_be_predicted_by_their_folder(tmp_path):
    make_tree(tmp_path / "t", (("test", 3),), ("bird", "red"))
    root = tree(tmp_path)
    with pytest.raises(
        DataError, match=r"test has classes that training lacks: bird; `tl predict --data.target .*test`"
    ):
        folders(root).domains("train")
    assert len(folders(root / "test", classes=list(CLASSES)).predict_dataloader().dataset) == 6


def test_only_files_of_one_size_are_opened(tmp_path, monkeypatch):
    contents = {"a": b"1" * 9000, "b": b"1" * 9000, "c": b"2" * 9000, "d": b"3" * 10, "e": b"1" * 4500 + b"4" * 4500}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    opened = []
    monkeypatch.setattr("datamodules.files._middle_hash", lambda path: opened.append(path[-1]))
    paths = {"train": [f"{tmp_path}/{name}" for name in "ade"], "val": [f"{tmp_path}/{name}" for name in "bc"]}
    assert find_copies(paths) == [[("train", f"{tmp_path}/a"), ("val", f"{tmp_path}/b")]]
    assert set(opened) == set("abce")


def flat(root, count=6):
    for i in range(count):
        image(root / f"{i}.png", (9, 9, 9), seed=i)


def test_a_flat_test_folder_can_be_predicted_and_is_no_test(tmp_path):
    root = tree(tmp_path, ("train", 8))
    flat(root / "test")
    data = folders(root)
    assert data.class_names == list(CLASSES)
    assert sizes(data) == [12, 4, 6]
    assert len(data.predict_dataloader().dataset) == 6
    assert set(data.ids_and_labels("target", "test")[1]) == {""}
    with pytest.raises(DataError, match=r"t/test has no labels for lack of class folders; `tl predict` can use it"):
        data.test_dataloader()


def test_an_empty_or_unlabelled_val_says_what_is_missing(tmp_path):
    root = tree(tmp_path, ("train", 8))
    (root / "val").mkdir()
    with pytest.raises(DataError, match="its val split has no samples; fill it, or remove it"):
        folders(root).val_dataloader()
    flat(root / "val")
    with pytest.raises(DataError, match=r"t/val has no labels for lack of class folders"):
        folders(root).val_dataloader()
    assert len(folders(root).predict_dataloader().dataset) == 6


def test_what_wraps_images_says_so_too(tmp_path):
    root = tree(tmp_path, ("train", 8))
    flat(root / "test")
    synthetic = SyntheticDomains(folders(root), {"a": NoShift(), "b": NoShift()}, target="a")
    assert len(synthetic.predict_dataloader().dataset) == 3  # half of them are the other domain's
    for data in (synthetic, ClassSubset(folders(root), target=["blue", "red"])):
        with pytest.raises(DataError, match="has no labels for lack of class folders"):
            data.test_dataloader()


def test_an_unlabelled_target_trains_beside_a_source(tmp_path):
    source = tree(tmp_path / "s")
    flat(tmp_path / "t" / "train", 10)
    data = folders(tmp_path / "t", source=source)
    (batch, *_) = next(iter(data.train_dataloader()))
    assert batch["target"][1] is None
    with pytest.raises(DataError, match="has no labels"):
        folders(tmp_path / "t", source=source, target_labels=True).train_dataloader()
    with pytest.raises(DataError, match="has no labels"):
        folders(tmp_path / "t", source=source, labelled=3).train_dataloader()


def test_prediction_takes_all_where_there_is_one_split(tmp_path):
    assert len(folders(tree(tmp_path / "a", ("Train", 16))).predict_dataloader().dataset) == 32
    assert len(folders(tree(tmp_path / "b", ("x", 20)) / "x").predict_dataloader().dataset) == 40
    flat(tmp_path / "c", 1)
    data = folders(tmp_path / "c" / "0.png", classes=["x", "y"])
    assert (len(data.predict_dataloader().dataset), data.ids()) == (1, [f"{tmp_path}/c/0.png"])
    with pytest.raises(DataError, match="no class folders"):
        folders(tmp_path / "c" / "0.png")


@pytest.mark.parametrize("split", ["x", "train"])
def test_how_much_is_tested_is_said_and_all_can_be(split, tmp_path, caplog):
    root = tree(tmp_path, (split, 20)) / ("x" if split == "x" else "")
    with caplog.at_level(logging.INFO):
        assert len(folders(root).test_dataloader().dataset) == 8
    assert (
        "8 of 40 samples" in caplog.text or "of 40 samples 24 are for training, 8 for validation and 8" in caplog.text
    )
    assert len(folders(root, test_fraction=1).test_dataloader().dataset) == 40


def test_a_table_without_a_label_in_its_test(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "good,x\nbad,y\n" * 5)
    (tmp_path / "test.csv").write_text("text\n" + "what\n" * 6)
    data = TextFiles(tmp_path)
    assert len(data.train_dataloader().flattened[0].dataset) == 8
    assert len(data.predict_dataloader().dataset) == 6
    with pytest.raises(DataError, match=r"test\.csv has no labels"):
        data.test_dataloader()


def test_recordings_without_class_folders(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    for name in ("train/no/{}", "train/yes/{}", "Test/{}"):
        for i in range(6):
            file = tmp_path / f"{name.format(i)}.wav"
            file.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(file, [0.1] * 80, 800)
    data = AudioFolders(tmp_path, classes=["no", "yes"], num_workers=0)
    assert sizes(data)[2] == 6
    assert len(data.predict_dataloader().dataset) == 6
    with pytest.raises(DataError, match="has no labels for lack of class folders"):
        data.test_dataloader()


def test_predict_and_test_through_the_command(ok, tl, tmp_path):
    root = tree(tmp_path, ("train", 8))
    flat(root / "test")
    ok("fit --trainer.max_epochs 1 --model Classification --model.backbone ConvNet --model.backbone.width 4 --name a "
       "--data ImageFolders --data.image_size 16 --data.num_workers 0 --data.target t")  # fmt: skip
    assert "6 predictions" in ok("predict --run runs/a")
    assert "1 predictions" in ok("predict --run runs/a --data.target t/test/0.png")
    refused = tl("test --run runs/a")
    assert refused.code == 2
    assert "t/test has no labels for lack of class folders" in refused.err
    ok("test --run runs/a --data.target t/train --data.test_fraction 1")
    Image.new("RGB", (9, 9)).save(tmp_path / "new.jfif")
    assert "1 predictions" in ok("predict --run runs/a --data.target new.jfif")


@pytest.mark.parametrize("split", ["", "train/"])
def test_a_list_of_files_is_read_as_the_folder_that_it_lists(ok, tl, tmp_path, split):
    for name in ("a-b", "a", "c/d", "c"):  # sorted folder by folder
        for number in range(6):
            image(tmp_path / "t" / split / name / f"{number}.png", (9, 99, 9), size=(8, 8), seed=number)
    (tmp_path / "t" / "notes.md").touch()
    image(tmp_path / "t" / split / "a" / ".hidden.png", (9, 9, 9))
    subprocess.run("find -L . -type f > files.txt", shell=True, cwd=tmp_path / "t", check=True)
    whole, listed = (ImageFolders(tmp_path / "t" / each, image_size=8) for each in ("", "files.txt"))
    assert listed.class_names == ["a", "a-b", "c"] == whole.class_names
    for part in ("train", "val"):
        one, two = (data.domains(part)["target"] for data in (whole, listed))
        assert list(one.ids) == list(two.ids)
        assert one.fingerprint() == two.fingerprint()
    lines = (tmp_path / "t" / "files.txt").read_text().splitlines()
    (tmp_path / "t" / "some.txt").write_text("\n".join(line for line in lines if "/c/" not in line))
    assert ImageFolders(tmp_path / "t" / "some.txt").class_names == ["a", "a-b"]
    ok("fit --data ImageFolders --data.target t/some.txt --data.image_size 8 --data.num_workers 0 --model Classification "
       "--model.backbone ConvNet --model.backbone.width 4 --trainer.max_epochs 1 --name a")  # fmt: skip
    ok("predict --run runs/a")


def test_a_list_of_files_with_a_byte_order_mark(tmp_path):
    root = tree(tmp_path, ("", 6))
    lines = "\r\n".join(f"{label}/{number}.png" for label in CLASSES for number in range(6))
    (root / "files.txt").write_text(lines, encoding="utf-8-sig")
    assert folders(root / "files.txt").class_names == list(CLASSES)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "it names no files; write one path per line"),
        ("../x/1.png", "../x/1.png is not below"),
        ("/x/1.png", "/x/1.png is not below"),
        ("a/1.png\nb/1.png", "a/1.png: it cannot be read any more"),
    ],
)
def test_a_list_of_files_that_cannot_be_read(tmp_path, lines, message):
    (tmp_path / "files.txt").write_text(lines)
    with pytest.raises(DataError, match=re.escape(message)):
        ImageFolders(tmp_path / "files.txt").domains("train")["target"].fingerprint()


def test_paths_are_a_sequence_of_texts():
    texts = ["a/1.png", "", "\u00e9/2.png", os.fsdecode(b"\xe9")]
    paths = Paths(texts)
    paths.extend(Paths(["x"]))
    assert list(paths) == [*texts, "x"]
    assert (paths[-1], paths[1:3], len(paths)) == ("x", texts[1:3], 5)
    assert paths.index("x") == 4
    with pytest.raises(IndexError):
        paths[5]
