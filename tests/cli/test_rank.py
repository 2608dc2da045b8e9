"""`tl rank`: its order, its cache, its inputs, and candidates that fail."""

import csv
import math

import pytest
import torch
from conftest import make_tree
from safetensors.torch import save_file

from datamodules import DataError, Digits
from tl_modules import ConvNet
from tl_modules.cli.candidates import build
from tl_modules.cli.rank import measured, ordered

DATA = "--data Digits --data.shots_per_class 4"


def table(path="rank.csv"):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_a_pretrained_backbone_is_before_a_random_one(ok):
    ok("fit --data Digits --trainer.max_epochs 3 --name known")
    (known,) = (line for line in ok("rank runs/known --data Digits").splitlines() if line.startswith("[1/1]"))
    assert "logme" in known
    out = ok("rank ConvNet runs/known ConvNet=runs/known/version_0 --data Digits --out found.csv")
    first, second, last = table("found.csv")
    assert {first["backbone"], second["backbone"]} == {"runs/known", "ConvNet=runs/known/version_0"}
    assert last["backbone"] == "ConvNet"
    assert [row["rank"] for row in (first, second, last)] == ["1", "2", "3"]
    assert float(first["linear_probe"]) > float(last["linear_probe"])
    # the same weights, by way of the run and by way of its file
    for key in ("linear_probe", "logme", "h_score", "knn", "leep", "nce", "parameters", "macs"):
        assert float(first[key]) == pytest.approx(float(second[key]), rel=1e-3)
    assert last["leep"] == ""  # it has no classifier
    assert out.splitlines()[-1] == "found.csv"


def test_features_are_computed_once(ok, said):
    class_line = f"rank small.yaml {DATA}"
    with open("small.yaml", "w") as file:
        file.write("small: {class_path: ConvNet, init_args: {width: 4}}\n")
    ok(class_line)
    assert any("features cached in" in text for text in said())
    first = table()
    ok(class_line)
    assert [text for text in said() if "features" in text and "of an earlier run" not in text] == []
    again = table()
    assert [{**row, "ms": 0} for row in again] == [{**row, "ms": 0} for row in first]


def test_a_fit_reads_the_features_of_a_rank(ok, said):
    torch.save(ConvNet(4).model.state_dict(), "w.pth")
    with open("known.yaml", "w") as file:
        file.write("known: {class_path: ConvNet, init_args: {width: 4, weights: w.pth}}\n")
    ok("rank known.yaml --data Digits")
    said()
    ok("fit --data Digits --model.backbone.width 4 --model.backbone.weights w.pth --trainer.max_epochs 2 "
       "--model.finetuning FeatureExtraction")  # fmt: skip
    assert any(text.startswith("cache: target train: features of an earlier run") for text in said())


def test_one_that_fails_stops_no_other(tl):
    result = tl(f"rank resnet19 ConvNet ConvNet=nowhere.pth {DATA}")
    assert result.code == 1
    assert "resnet19: failed: resnet19 is not a classifier of torchvision or timm" in result.out
    assert "did you mean resnet1" in result.out
    assert "ConvNet=nowhere.pth: failed: weights: there is no file or run directory nowhere.pth" in result.out
    assert [row["status"] for row in table()] == ["ranked", "failed", "failed"]


def test_what_is_too_slow_is_left_out(ok):
    ok(f"rank ConvNet {DATA} --budget_ms 0.000001")
    (row,) = table()
    assert row["status"] == "over budget"
    assert row["linear_probe"] == row["rank"] == ""
    assert float(row["ms"]) > 0


def test_it_reads_training_samples_alone():
    class Watched(Digits):
        splits = set()

        def domains(self, split):
            self.splits.add(split)
            return super().domains(split)

    measured(ConvNet(4), None, Watched(shots_per_class=4))
    assert Watched.splits == {"train"}


def test_the_labelled_samples_are_those_that_training_sees():
    augment = [torch.nn.Dropout(1.0)]
    data = Digits(labelled=30, augment=augment)
    loader = data.labelled_dataloader()
    shown = data.train_dataloader().iterables["target/labelled"].dataset
    assert list(loader.dataset.rows) == list(shown.rows)
    x, _, index = next(iter(loader))["target/labelled"]
    assert x.float().mean() > 0  # not augmented
    assert index.tolist() == list(shown.rows)[: len(x)]
    assert len(Digits(shots_per_class=2).labelled_dataloader().dataset) == 20
    assert len(Digits(source=True, target_labels=True).labelled_dataloader().dataset) == 449
    assert Digits(source=True, target=False).labelled_dataloader().domain == "source"
    with pytest.raises(DataError, match="they are hidden"):
        Digits(source=True).labelled_dataloader()


def test_values_are_ranked_too(ok):
    with open("rows.csv", "w") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", "y"])
        x = torch.randn(80, 2, generator=torch.Generator().manual_seed(0)).tolist()
        writer.writerows([a, b, a - b] for a, b in x)
    ok("rank TabularMLP --data TabularData --data.target rows.csv --data.label y --data.kind values")
    (row,) = table()
    assert float(row["linear_probe"]) > 0.5
    assert math.isfinite(float(row["logme"]))
    assert row["h_score"] == row["leep"] == ""


def test_a_classifier_of_torchvision_scores_by_its_classes(ok, tmp_path):
    from torchvision.models import shufflenet_v2_x0_5

    make_tree(tmp_path / "tree")
    save_file(shufflenet_v2_x0_5().state_dict(), "w.safetensors")
    ok("rank shufflenet_v2_x0_5=w.safetensors --data ImageFolders --data.target tree --data.image_size 32")
    (row,) = table()
    assert -3 < float(row["leep"]) <= 0
    assert -3 < float(row["nce"]) <= 0


def test_words_become_backbones():
    backbone, classifier = build("squeezenet1_0=null")
    assert backbone.random
    assert classifier is None
    pytest.importorskip("timm")
    assert type(build("resnet10t.c3_in1k=null")[0]).__name__ == "TimmBackbone"


def test_the_order():
    rows = [
        {"backbone": "a"},
        {"backbone": "b", "knn": 0.2},
        {"backbone": "c", "knn": math.nan},
        {"backbone": "d", "knn": 0.7},
    ]
    found = ordered(rows, "knn")
    assert [row["backbone"] for row in found] == ["d", "b", "a", "c"]
    assert [row.get("rank") for row in found] == [1, 2, None, None]
