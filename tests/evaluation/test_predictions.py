"""Many classes: predictions keep the most probable ones, and a fit leaves costly metrics to `tl test`."""

import csv
import json

import numpy as np
import pytest

FIT = "fit --data TabularData --data.target t.csv --model Classification --model.backbone TabularMLP --name a {more}"


@pytest.fixture
def table(tmp_path, ok):
    """A table of `count` classes, four rows each."""

    def make(count, label="c{}"):
        rows = np.random.default_rng(0).normal(size=(4 * count, 2)).tolist()
        lines = [f"{a:.3f},{b:.3f},{label.format(row % count)}" for row, (a, b) in enumerate(rows)]
        (tmp_path / "t.csv").write_text("\n".join(["a,b,y", *lines]))

    return make


def rows_of(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_top_k_writes_the_most_probable_classes(ok, tl, table, tmp_path):
    table(5)
    ok(FIT, more="--trainer.max_epochs 1")
    ok("predict --run runs/a --out all.csv")
    ok("predict --run runs/a --out top.csv --top_k 2")
    every, top = rows_of(tmp_path / "all.csv"), rows_of(tmp_path / "top.csv")
    assert list(top[0]) == ["id", "label", "p", "label_2", "p_2"]
    for whole, best in zip(every, top, strict=True):
        ranked = sorted((name for name in whole if name.startswith("p_")), key=lambda name: -float(whole[name]))
        assert [f"p_{best['label']}", f"p_{best['label_2']}"] == ranked[:2]
        assert (best["id"], best["p"], best["p_2"]) == (whole["id"], whole[ranked[0]], whole[ranked[1]])
    ok("predict --run runs/a --out more.csv --top_k 9")  # more than there are
    assert list(rows_of(tmp_path / "more.csv")[0])[-2:] == ["label_5", "p_5"]
    assert "top_k: 0 must be at least 1" in tl("predict --run runs/a --top_k 0").err
    table(5, "{}.5")
    ok(FIT.replace("Classification", "Regression").replace("name a", "name b"), more="--trainer.max_epochs 1")
    assert "top_k: Regression does not classify" in tl("predict --run runs/b --top_k 2").err


@pytest.mark.parametrize(
    ("classes", "more", "validated"),
    [
        (199, "", True),
        (201, "", False),
        (201, "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor val/auroc", True),
    ],
)
def test_auroc_of_many_classes_is_left_to_the_test(ok, table, tmp_path, classes, more, validated):
    table(classes)
    ok(FIT, more=f"--trainer.max_epochs 1 {more}")
    ok("test --run runs/a")
    metrics = json.loads((tmp_path / "runs/a/version_0/metrics.json").read_text())
    assert ("val/auroc" in metrics) == validated
    assert {"val/accuracy", "val/f1", "test/auroc"} <= metrics.keys()
    ok("validate --run runs/a")
    assert "val/auroc" in json.loads((tmp_path / "runs/a/version_0/metrics.json").read_text())
