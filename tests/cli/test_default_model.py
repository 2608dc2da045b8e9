"""No model, or no backbone of it, is named: photos get a pretrained one, small images a small one."""

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import yaml

import tl_modules.cli.default_model as default_model
from tl_modules import TorchvisionBackbone
from tl_modules.cli.default_model import with_defaults

PHOTOS = ["--model.backbone", "TorchvisionBackbone", "--model.backbone.name"]


def added(line, **files):
    words = line.split()
    return " ".join(with_defaults(words)[1 : -len(words) + 1 or None])


@pytest.fixture(params=[False, True])
def gpu(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    return request.param


def test_photos_get_the_backbone_of_the_device(gpu, caplog):
    caplog.set_level("INFO")
    name = "convnext_tiny" if gpu else "mobilenet_v3_large"
    for line in ("fit --data ImageFolders", "fit --data datamodules.DomainFolders --model Classification"):
        assert f"{' '.join(PHOTOS)} {name}" in added(line)
    assert f"backbone: {name}, torchvision's IMAGENET1K_V1" in caplog.text
    assert "mobilenet_v3_large" in added("fit --data ImageFolders --trainer.accelerator cpu")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("fit --data.source true", "--model Classification --model.backbone ConvNet --data Digits"),
        ("fit --data ImageArrays", "--model Classification --model.backbone ConvNet"),
        ("fit --data SyntheticDomains --data.data Digits", "--model Classification --model.backbone ConvNet"),
        ("fit --data Digits --model Regression", "--model Regression --model.backbone ConvNet"),
        ("fit --data ImageFolders --model.backbone LeNet", "--model Classification"),
        ("fit --data AudioFolders", "--model Classification --model.backbone SpeechConvNet"),
        (
            "fit --data TextFiles",
            f"--model Classification --model.backbone TransformerBackbone --model.backbone.name {default_model.ENCODER}",
        ),
        ("fit --data TabularData --model Regression", "--model Regression --model.backbone TabularMLP"),
        (
            "fit --data Tables",
            f"--model Classification --model.backbone TabularMLP {' '.join(default_model._for_rows((), ()))}",
        ),
        ("fit --data Digits --model nowhere.Mine", ""),  # may have no backbone
        ("fit --data Digits --model nowhere.Mine --model.backbone LeNet", ""),
    ],
)
def test_other_data_and_named_backbones(line, wanted):
    assert added(line) == wanted


def test_rows_are_trained_as_features_are():
    sgd = "--model.optimizer SGD --model.optimizer.lr 0.01 --model.optimizer.momentum 0.9"
    line = "fit --data TabularData --model.backbone TabularMLP"
    assert f"--model Classification --model.head torch.nn.Linear {sgd}" in added(line)
    assert "SGD" not in added(f"{line} --model.optimizer AdamW")
    assert added(f"{line} --model Classification").startswith("--model Classification --model.head")
    assert "Linear" not in added(f"{line} --model.head MLPHead")
    assert "SGD" in added(f"{line} --model.optimizer.lr 0.1")  # a later word, which wins
    for other in ("--model Regression", "--model.backbone.weights runs/a"):
        assert "SGD" not in added(f"{line} {other}")


def test_rows_and_a_named_task_train(ok, tmp_path):
    table = "\n".join(f"{i % 7},{i % 5},{'ab'[i % 7 > 3]}" for i in range(40))
    (tmp_path / "rows.csv").write_text(f"u,v,kind\n{table}\n")
    ok("fit --data TabularData --data.target rows.csv --model Classification --model.backbone TabularMLP "
       "--trainer.max_epochs 1 --name rows")  # fmt: skip
    config = yaml.safe_load((tmp_path / "runs/rows/version_0/config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.SGD"


def test_data_within_data_and_configs_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"class_path": "ClassSubset", "init_args": {"data": {"class_path": "ImageFolders"}}}
    Path("data.yaml").write_text(yaml.safe_dump({"data": data}))
    Path("model.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"backbone": "LeNet"}}}))
    assert "TorchvisionBackbone" in added("fit -c data.yaml")
    assert "TorchvisionBackbone" in added("fit --data ClassSubset --data.data ImageFolders")
    assert added("fit -c data.yaml -c model.yaml") == "--model Classification"


def test_photos_of_ones_own(module_file):
    module_file("my_photos", "from datamodules import ImageFolders\nclass Mine(ImageFolders): pass")
    assert "TorchvisionBackbone" in added("fit --data my_photos.Mine")


@pytest.fixture
def small(monkeypatch):
    """A default that is quick."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(default_model.PHOTOS, False, ("squeezenet1_1", "IMAGENET1K_V1", "it is small"))


def test_without_a_network_one_sentence_says_which_file_goes_where(tl, tree, small, monkeypatch, tmp_path):
    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    result = tl("fit --data ImageFolders --data.target {tree}", tree=tree)
    assert result.code == 2
    (sentence,) = (line for line in result.err.splitlines() if line.startswith("tl: error:"))
    assert "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth" in sentence
    assert f"put it into {tmp_path / 'torch/hub/checkpoints'}" in sentence
    assert "--model.backbone.weights FILE" in sentence


def test_the_config_has_what_was_resolved_and_a_run_is_the_same_again(ok, tree, small, tmp_path):
    torch.save(TorchvisionBackbone("squeezenet1_1").model.state_dict() | CLASSIFIER, tmp_path / "w.pth")
    line = f"--data ImageFolders --data.target {tree} --data.num_workers 0 --trainer.max_epochs 1 "
    ok(f"fit {line} --model.backbone.weights w.pth --trainer.limit_train_batches 1 --name a")
    ok(f"fit {line} --model.backbone.weights w.pth --model.finetuning FeatureExtraction --name b")
    ok(f"fit {line} --model.backbone.weights w.pth --data.image_size 48 --data.augment strong --name c")
    found = {n: yaml.safe_load((tmp_path / f"runs/{n}/version_0/config.yaml").read_text()) for n in "abc"}
    names = ("image_size", "resize_size", "interpolation", "augment")
    assert {n: tuple(config["data"]["init_args"][name] for name in names) for n, config in found.items()} == {
        "a": (224, 256, "bilinear", "light"),
        "b": (224, 256, "bilinear", "none"),
        "c": (48, 48, "bilinear", "strong"),
    }
    backbone = found["a"]["model"]["init_args"]["backbone"]
    assert backbone["class_path"] == "tl_modules.TorchvisionBackbone"
    assert backbone["init_args"]["name"] == "squeezenet1_1"
    ok("test --run runs/a")


CLASSIFIER = {"classifier.1.weight": torch.zeros(1000, 512, 1, 1), "classifier.1.bias": torch.zeros(1000)}


def test_a_config_may_set_arguments_of_a_class_that_follows(ok, tmp_path):
    (tmp_path / "a.yaml").write_text("model:\n  init_args:\n    methods+:\n    - class_path: L2SP\n")
    (tmp_path / "b.yaml").write_text("data:\n  init_args:\n    seed: 5\n")
    ok("fit -c a.yaml -c b.yaml --data Digits --model Classification --model.backbone ConvNet --model.backbone.width 2 "
       "--trainer.max_epochs 1 --trainer.limit_train_batches 1 --name a")  # fmt: skip
    config = yaml.safe_load((tmp_path / "runs/a/version_0/config.yaml").read_text())
    assert config["data"]["init_args"]["seed"] == 5
    assert config["model"]["init_args"]["methods"][0]["class_path"] == "tl_modules.L2SP"
