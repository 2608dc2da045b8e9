"""Trees of several domains, in the layouts of the benchmarks."""

import numpy as np
import pytest
from conftest import image, make_tree

from datamodules import DataError, DomainFolders, ImageFolders


@pytest.fixture
def office(tmp_path):
    """Office-31's layout in one domain, the flat one in two, and what does not belong to it."""
    make_tree(tmp_path / "office" / "amazon", (("images", 5),))
    make_tree(tmp_path / "office", (("dslr", 5), ("Real World", 6)))
    (tmp_path / "office" / "notes.txt").write_text("")
    (tmp_path / "office" / ".cache" / "a").mkdir(parents=True)
    (tmp_path / "office" / "empty").mkdir()
    return tmp_path / "office"


def make(root, *args, **kwargs):
    return DomainFolders(root, *args, image_size=16, num_workers=0, **kwargs)


def counts(data, split="train"):
    return {name: len(dataset) for name, dataset in data.domains(split).items()}


def test_all_others_are_sources(office):
    data = make(office, "dslr")
    assert counts(data) == {"source/Real World": 12, "source/amazon": 9, "target": 9}
    assert data.class_names == ["blue", "green", "red"]
    batch, *_ = next(iter(data.train_dataloader()))
    assert batch["target"][1] is None
    assert batch["source/amazon"][0].shape[1:] == (3, 16, 16)
    everything = [name for s in ("train", "val", "test") for name in data.domains(s)["target"].ids]
    assert len(everything) == len(set(everything)) == 15


def test_one_source_no_source_and_no_target(office):
    assert list(counts(make(office, "dslr", ["amazon"]))) == ["source", "target"]
    assert list(counts(make(office, "dslr", []))) == ["target"]
    assert list(counts(make(office))) == ["source/Real World", "source/amazon", "source/dslr"]


def test_a_hidden_target_is_split_without_its_labels(office):
    hidden, open_ = make(office, "Real World"), make(office, "Real World", [])
    assert np.bincount(open_.domains("val")["target"].targets).tolist() == [1, 1, 1]
    relabelled = make(office, "Real World", classes=["red", "green", "blue"])
    # the images come in another order, but the same places are taken
    assert np.array_equal(hidden.domains("val")["target"].rows, relabelled.domains("val")["target"].rows)


def test_visda_has_a_class_named_train(tmp_path):
    make_tree(tmp_path, (("train", 5), ("validation", 5)), classes=("bus", "train", "test"))
    data = make(tmp_path, target="validation")
    assert counts(data) == {"source": 9, "target": 9}
    assert data.class_names == ["bus", "test", "train"]


def test_domainnet_lists(tmp_path):
    for domain in ("clipart", "real"):
        make_tree(tmp_path, ((domain, 6),))
    for split, numbers in (("train", range(5)), ("test", (5,))):
        lines = [
            f"clipart/{name}/{i}.png {label}" for label, name in enumerate(("blue", "green", "red")) for i in numbers
        ]
        (tmp_path / f"clipart_{split}.txt").write_text("\n".join(lines) + "\n")
    data = make(tmp_path, "clipart")
    assert [counts(data, split)["target"] for split in ("train", "val", "test")] == [12, 3, 3]
    assert all(name.endswith("5.png") for name in data.domains("test")["target"].ids)
    assert data.domains("test")["target"].targets.tolist() == [0, 1, 2]
    assert counts(data)["source"] == 12
    (tmp_path / "clipart_test.txt").write_text("clipart/purple/1.png 3\n")
    with pytest.raises(DataError, match="names classes that have no folder: purple"):
        make(tmp_path, "clipart").domains("test")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            {"target": "dlsr"},
            r"target: there is no domain dlsr \(did you mean dslr\?\); there are Real World, amazon, dslr",
        ),
        ({"target": "dslr", "sources": ["amazn"]}, r"sources: there is no domain amazn \(did you mean amazon\?\)"),
        ({"target": "dslr", "sources": ["dslr"]}, "sources: there is no domain dslr"),
        ({"target": "empty"}, "target: there is no domain empty"),
    ],
)
def test_unknown_domains(office, arguments, match):
    with pytest.raises(DataError, match=match):
        make(office, **arguments)


def test_a_root_without_domains(tmp_path):
    image(tmp_path / "a.png", (1, 2, 3))
    with pytest.raises(DataError, match="has no domains"):
        make(tmp_path)


def test_classes_that_not_all_domains_have(office):
    image(office / "dslr" / "lamp" / "1.png", (1, 2, 3))
    with pytest.raises(DataError, match="their classes differ: only the target has lamp"):
        make(office, "dslr")
    image(office / "amazon" / "images" / "lamp" / "1.png", (1, 2, 3))
    with pytest.raises(DataError, match="only the source/amazon and target have lamp"):
        make(office, "dslr")
    data = make(office, "dslr", classes=["blue", "green", "lamp", "red"])
    assert data.domains("train")["target"].targets.max() == 3


def test_image_folders_take_several_sources_by_name(tree, tmp_path):
    other = make_tree(tmp_path / "other")
    data = ImageFolders(tree, {"a": tree, "b": other}, image_size=16)
    assert list(data.domains("train")) == ["source/a", "source/b", "target"]
    assert list(ImageFolders(tree, {"a": other}).domains("train")) == ["source", "target"]


def test_from_the_command_line(ok, office, tmp_path):
    data = "--data DomainFolders --data.root office --data.target dslr --data.image_size 28 --data.num_workers 0"
    config = ok(f"fit {data} --print_config")
    assert "  source:" not in config
    ok(f"fit {data} --trainer.max_epochs 1 --model.backbone ConvNet --model.backbone.width 4 --name a")
    assert "test/accuracy" in ok("test --run runs/a")
    ok("predict --run runs/a --out out.csv")
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 1 + 15


def test_one_list_of_two_is_not_ignored(tmp_path):
    make_tree(tmp_path, (("clipart", 3), ("real", 3)))
    (tmp_path / "clipart_train.txt").write_text("clipart/red/0.png 0\n")
    data = DomainFolders(tmp_path, "clipart", [], image_size=16)
    with pytest.raises(DataError, match=r"clipart_train.txt is there, but not clipart_test.txt"):
        data.domains("train")
