"""Partial and open-set adaptation."""

import numpy as np
import pytest
from conftest import make_tree

from datamodules import ClassSubset, DataError, Digits, ImageFolders, TabularData

ALL = [str(digit) for digit in range(10)]


def digits(**kwargs):
    return Digits(source=True, **kwargs)


def present(data, domain, split="train"):
    return sorted(set(data.domains(split)[domain].targets.tolist()))


def test_partial_keeps_the_numbers_of_the_whole_list():
    data = ClassSubset(digits(), target=["1", "7"])
    assert data.class_names == ALL
    assert len(data.class_names) == 10
    assert present(data, "source") == list(range(10))
    assert present(data, "target") == [1, 7]
    whole, kept = digits().domains("train")["target"], data.domains("train")["target"]
    rows = np.flatnonzero(np.isin(whole.targets, [1, 7]))
    assert len(kept) == len(rows)
    for place in (0, len(rows) - 1):
        assert kept[place][1] == whole.targets[rows[place]]
        assert (kept[place][0] == whole[rows[place]][0]).all()


def test_open_set_calls_the_rest_unknown():
    data = ClassSubset(digits(), source=["5", "3"], target=["3", "5", "8", "9"], open_set=True)
    assert data.class_names == ["3", "5", "unknown"]
    assert len(data.class_names) == 3
    assert present(data, "source") == [0, 1]
    assert present(data, "target") == [0, 1, 2]
    whole = digits().domains("test")["target"].targets
    counts = np.bincount(data.domains("test")["target"].targets).tolist()
    assert counts == [(whole == 3).sum(), (whole == 5).sum(), np.isin(whole, [8, 9]).sum()]
    assert data.domains("test")["target"][0][1] == data.domains("test")["target"].targets[0]


def test_labels_stay_hidden():
    data = ClassSubset(digits(), source=["1", "2"], open_set=True, batch_size=8)
    batch, *_ = next(iter(data.train_dataloader()))
    assert batch["target"][1] is None
    assert set(batch["source"][1].tolist()) <= {0, 1}
    assert data.labels("test").max() == 2


def test_all_classes_are_the_same_data():
    data = ClassSubset(digits())
    assert all(len(d) == len(digits().domains("val")[name]) for name, d in data.domains("val").items())
    first = data.domains("train")["source"].fingerprint()
    assert first == ClassSubset(digits()).domains("train")["source"].fingerprint()
    assert first != ClassSubset(digits(), source=["1", "2", "3"]).domains("train")["source"].fingerprint()
    one, two = (ClassSubset(digits(), source=s, target=ALL, open_set=True) for s in (["1", "2"], ["1", "3"]))
    assert one.domains("val")["target"].fingerprint() != two.domains("val")["target"].fingerprint()


def test_trees_of_different_classes(tmp_path):
    source = make_tree(tmp_path / "s", (("train", 5), ("val", 2)), classes=("blue", "green"))
    target = make_tree(tmp_path / "t", (("train", 5), ("val", 2)), classes=("blue", "red"))
    inner = ImageFolders(target, source, image_size=16, classes=["blue", "green", "red"], num_workers=3)
    data = ClassSubset(inner, source=["blue", "green"], open_set=True)
    assert data.num_workers == 3
    assert ClassSubset(inner, num_workers=0).num_workers == 0
    assert present(data, "target") == [0, 2]
    assert data.domains("val")["target"] is data.domains("test")["target"]  # there is no test folder
    assert data.domains("train")["target"].ids[0].endswith("blue/0.png")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"source": ["11"]}, r"source: there is no class 11 \(did you mean 1\?\)"),
        ({"target": ["x"]}, "target: there is no class x"),
    ],
)
def test_unknown_classes(arguments, match):
    with pytest.raises(DataError, match=match):
        ClassSubset(digits(), **arguments)


def test_no_classes_and_nothing_left(tmp_path):
    np.savez(tmp_path / "a.npz", features=np.zeros((9, 2)), labels=np.linspace(0, 1, 9))
    with pytest.raises(DataError, match="labels of TabularData are not classes"):
        ClassSubset(TabularData(tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", features=np.zeros((20, 2)), labels=np.array([0, 1] * 9 + [2, 2]))
    data = ClassSubset(TabularData(tmp_path / "b.npz", test_fraction=0.1), target=["2"])
    with pytest.raises(DataError, match="target: no test sample of target has one of these classes"):
        data.domains("test")
    np.savez(tmp_path / "c.npz", features=np.zeros((9, 2)), labels=np.array(["unknown", "a", "b"] * 3))
    with pytest.raises(DataError, match="the source already has a class unknown"):
        ClassSubset(TabularData(tmp_path / "c.npz"), open_set=True)


def test_fit_from_the_command_line(ok):
    data = "--data ClassSubset --data.data Digits --data.data.source true --data.source [1,2,3] --data.open_set true"
    line = f"fit {data} --trainer.max_epochs 1 --model.backbone.width 4 --model.methods+=OSBP --name a"
    ok(line.replace("[1,2,3]", '["1","2","3"]'))
    assert "test/accuracy" in ok("test --run runs/a")
