"""The front door: runs, configs, commands."""

import csv
import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import image, make_tree

from tl_modules import Classification, UserError, load_run

SMALL = "--trainer.max_epochs 2 --model.backbone ConvNet --model.backbone.width 4 --data.shots_per_class 4"
FOLDERS = "--data ImageFolders --data.image_size 32 --data.num_workers 0"


def read(run):
    return json.loads((run / "metrics.json").read_text())


def version(tmp_path, name="digits", number=0):
    return tmp_path / "runs" / name / f"version_{number}"


def test_a_run_has_one_directory(ok, tmp_path):
    printed = ok(f"fit {SMALL}")
    run = version(tmp_path)
    assert {p.name for p in run.iterdir() if not p.name.startswith(("events", "00000", "projector"))} == {
        "config.yaml",
        "checkpoints",
        "metrics.csv",
        "metrics.json",
    }
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert {"train/loss", "train/task/target", "val/accuracy", "val/f1", "lr/head", "lr/stage_0"} <= set(rows[0])
    best = read(run)
    assert best["val/accuracy"] == max(float(row["val/accuracy"]) for row in rows)
    assert "tl test --run runs/digits/version_0" in printed
    ok(f"fit {SMALL}")
    assert version(tmp_path, number=1).is_dir()


def test_default_root_dir_moves_the_runs(ok, tmp_path):
    ok(f"fit {SMALL} --trainer.default_root_dir elsewhere --name mine")
    assert (tmp_path / "elsewhere" / "runs" / "mine" / "version_0" / "metrics.json").is_file()
    assert not (tmp_path / "runs").exists()


def test_the_same_seed_gives_the_same_run(ok, tmp_path):
    for name in ("a", "b"):
        ok(f"fit {SMALL} --name {name} --seed_everything 7")
    ok(f"fit {SMALL} --name c --seed_everything 8")
    states = [
        torch.load(version(tmp_path, n) / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for n in "abc"
    ]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["head.1.weight"], states[2]["head.1.weight"])


def test_the_issues_command_line_on_a_tree_without_test(ok, tl, tmp_path, caplog):
    from safetensors.torch import save_file

    from tl_modules import TorchvisionBackbone

    make_tree(tmp_path / "dir", suffix="jpg")
    state = TorchvisionBackbone("squeezenet1_0").model.state_dict()
    save_file({k: v.half().contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    ok(
        "fit --model Classification --model.backbone TorchvisionBackbone --model.backbone.name squeezenet1_0 "
        "--model.backbone.weights w.safetensors --model.finetuning FeatureExtraction "
        "--data ImageFolders --data.target dir --data.batch_size 32 --trainer.max_epochs 2"
    )
    run = version(tmp_path, "imagefolders")
    caplog.clear()
    ok(f"test --run {run}")
    assert "no test split: `tl test` uses its validation split" in caplog.text
    metrics = read(run)
    assert metrics["test/accuracy"] == metrics["val/accuracy"]


def test_a_copied_run_from_elsewhere_gives_what_fit_reported(ok, tmp_path, monkeypatch):
    make_tree(tmp_path / "tree", (("train", 6), ("val", 4), ("test", 5)))
    (tmp_path / "w").mkdir()
    ok(
        f"fit {FOLDERS} --data.target tree --trainer.max_epochs 2 --model.backbone ConvNet --model.backbone.width 4 --name pre"
    )
    ok(
        f"fit {FOLDERS} --data.target tree --trainer.max_epochs 2 --model.backbone ConvNet --model.backbone.width 4 --name x "
        "--model.backbone.weights runs/pre/version_0 --model.finetuning LastStages"
    )
    run = version(tmp_path, "x")
    reported = read(run)
    copy = tmp_path / "far" / "away"
    shutil.copytree(run, copy)
    shutil.rmtree(tmp_path / "runs")  # neither the run nor the weights it started from are needed
    monkeypatch.chdir(tmp_path / "far")
    ok("validate --run away")
    again = read(copy)
    for key in ("val/accuracy", "val/loss", "val/f1", "val/auroc", "val/calibration_error"):
        assert again[key] == pytest.approx(reported[key], abs=1e-6)
    ok(f"test --run {copy}")
    ok(f"test --ckpt_path {copy}/checkpoints/best.ckpt")
    assert not (tmp_path / "far" / "runs").exists()
    assert "test/accuracy" in read(copy)


def test_a_run_keeps_its_settings_when_the_defaults_change(ok, tmp_path, monkeypatch):
    ok("fit --trainer.max_epochs 1 --data.shots_per_class 4 --name old")
    import tl_modules

    class Changed(tl_modules.ConvNet):
        def __init__(self, width: int = 8, weights: str | None = None, strict: bool = True, mean=None, std=None):
            super().__init__(width, weights, strict, mean, std)

    Changed.__module__, Changed.__qualname__ = "tl_modules", "ConvNet"
    monkeypatch.setattr(tl_modules, "ConvNet", Changed)
    ok("test --run runs/old/version_0")
    assert load_run("runs/old/version_0").backbone.out_features == 128
    ok("fit --trainer.max_epochs 1 --data.shots_per_class 4 --name new --model.backbone tl_modules.ConvNet")
    assert load_run("runs/new/version_0").backbone.out_features == 32


def test_layers_of_configs_and_the_command_line_last(ok, tmp_path):
    (tmp_path / "a.yaml").write_text(
        "model:\n  class_path: Classification\n  init_args:\n    backbone:\n      class_path: ConvNet\n"
        "      init_args: {width: 4}\n    finetuning: {class_path: LastStages, init_args: {k: 2}}\n"
    )
    (tmp_path / "b.yaml").write_text("model:\n  init_args:\n    finetuning: {init_args: {lr_decay: 0.5}}\n")
    (tmp_path / "c.yaml").write_text("model:\n  init_args:\n    methods+: [L2SP]\n")
    ok("fit -c a.yaml -c b.yaml -c c.yaml --model.finetuning.k 1 --trainer.max_epochs 1 --data.shots_per_class 4")
    arguments = yaml.safe_load((version(tmp_path) / "config.yaml").read_text())["model"]["init_args"]
    assert arguments["finetuning"]["init_args"].items() >= {"k": 1, "lr_decay": 0.5}.items()
    assert [m["class_path"] for m in arguments["methods"]] == ["tl_modules.L2SP"]
    assert len(arguments["schema"]["y"]["classes"]) == 10


def test_methods_from_the_command_line(ok, tmp_path):
    ok(f"fit {SMALL} --model.methods+=L2SP --model.methods.weight 0.3")
    assert load_run(version(tmp_path)).methods[0].weight == 0.3


def test_changing_the_class_leaves_no_argument_of_the_old_one_behind(ok, tmp_path):
    (tmp_path / "a.yaml").write_text("model:\n  class_path: Classification\n  init_args:\n    backbone: ConvNet\n")
    ok(
        "fit -c a.yaml --model.backbone TorchvisionBackbone --model.backbone.name squeezenet1_1 "
        "--trainer.max_epochs 1 --data.shots_per_class 2 --trainer.limit_val_batches 1"
    )
    assert torch.allclose(load_run(version(tmp_path)).backbone.mean.view(-1), torch.tensor([0.485, 0.456, 0.406]))


def test_augmentation_with_numbers_survives_in_the_saved_config(ok, tmp_path):
    v2 = "torchvision.transforms.v2"
    ok(f"fit {SMALL} --data.augment+={v2}.RandomAffine --data.augment.degrees 10 --data.augment+={v2}.RandomInvert")
    saved = yaml.safe_load((version(tmp_path) / "config.yaml").read_text())["data"]["init_args"]["augment"]
    assert saved[0]["init_args"]["degrees"] == 10
    ok("test --run runs/digits/version_0")


def test_the_command_line_wins_over_the_checkpoints_learning_rate(ok, tmp_path):
    small = f"{SMALL} --model.lr_scheduler null"
    ok(f"fit {small} --name a")
    line = small.replace("max_epochs 2", "max_epochs 4")
    ok(f"fit {line} --name b --ckpt_path runs/a/version_0/checkpoints/last.ckpt --model.optimizer AdamW "
       "--model.optimizer.lr 0.05")  # fmt: skip
    ok(f"fit {line} --name c --ckpt_path runs/a/version_0/checkpoints/last.ckpt")
    rates = {}
    for name in "bc":
        rows = list(csv.DictReader((version(tmp_path, name) / "metrics.csv").open()))
        assert [row["epoch"] for row in rows] == ["0", "1", "2", "3"]
        rates[name] = float(rows[-1]["lr/head"])
    assert rates == {"b": 0.05, "c": 0.003}


def test_predict_writes_path_label_and_probabilities(ok, tree, tmp_path):
    ok(f"fit {FOLDERS} --data.target tree --trainer.max_epochs 3 --model.backbone ConvNet --model.backbone.width 4")
    for i, colour in enumerate([(200, 20, 20), (20, 200, 20), (20, 20, 200)]):
        image(tmp_path / "new" / f"{i}.jpg", colour, seed=9 + i)
    ok("predict --run runs/imagefolders/version_0 --data.target new --out out/p.csv")
    rows = list(csv.DictReader((tmp_path / "out" / "p.csv").open()))
    assert list(rows[0]) == ["id", "label", "p_blue", "p_green", "p_red"]
    assert [row["id"] for row in rows] == [str(tmp_path / "new" / f"{i}.jpg") for i in range(3)]
    for row in rows:
        chances = {k[2:]: float(v) for k, v in row.items() if k.startswith("p_")}
        assert sum(chances.values()) == pytest.approx(1, abs=1e-5)
        assert max(chances, key=chances.get) == row["label"]


def test_data_with_other_classes_is_refused(ok, tl, tree, tmp_path):
    ok(f"fit {FOLDERS} --data.target tree --trainer.max_epochs 1 --model.backbone ConvNet --model.backbone.width 4")
    make_tree(tmp_path / "other", classes=("cat", "dog"))
    result = tl("test --run runs/imagefolders/version_0 --data.target other")
    assert result.code == 2
    assert "has classes that training lacks: cat, dog" in result.err
    make_tree(tmp_path / "fewer", classes=("red",))  # a test set may lack classes: their numbers stay
    assert tl("test --run runs/imagefolders/version_0 --data.target fewer").code == 0


def test_regression_through_the_front_door(ok, tmp_path):
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=images.mean((1, 2)) / 255)
    ok("fit --model Regression --model.backbone ConvNet --model.backbone.width 4 --data ImageArrays "
       "--data.target a.npz --trainer.max_epochs 2")  # fmt: skip
    ok("test --run runs/imagearrays/version_0")
    assert {"test/mae", "test/rmse", "test/r2", "val/rmse"} <= set(read(version(tmp_path, "imagearrays")))
    ok("predict --run runs/imagearrays/version_0 --out p.csv")
    assert (tmp_path / "p.csv").read_text().startswith("id,value\n")


def test_without_validation_the_last_epoch_is_the_best(ok, tmp_path):
    ok(f"fit {SMALL} --trainer.limit_val_batches 0")
    files = [version(tmp_path) / "checkpoints" / f"{n}.ckpt" for n in ("best", "last")]
    states = [torch.load(f, weights_only=True)["state_dict"] for f in files]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_last_is_the_last_epoch_also_when_it_is_not_the_best(ok, tmp_path):
    ok(f"fit {SMALL.replace('epochs 2', 'epochs 5')} --model.optimizer AdamW --model.optimizer.lr 1e-9")
    last, best = (
        torch.load(version(tmp_path) / "checkpoints" / f"{n}.ckpt", weights_only=True) for n in ("last", "best")
    )
    assert last["epoch"] == 4
    assert best["epoch"] == read(version(tmp_path))["epoch"]


def test_load_run(ok, tmp_path):
    ok(f"fit {SMALL}")
    module = load_run("runs/digits")
    assert isinstance(module, Classification)
    assert not module.training
    assert module.class_names == [str(i) for i in range(10)]
    with pytest.raises(UserError, match="not a run directory"):
        load_run(tmp_path)


@pytest.mark.parametrize("command", ["", "fit", "validate", "test", "predict"])
def test_help(command, tl):
    result = tl(f"{command} --help")
    assert result.code == 0
    assert ("--data" in result.out) == bool(command)
    assert ("--out" in result.out) == (command == "predict")


def test_print_config(ok):
    config = yaml.safe_load(ok("fit --model.finetuning LastStages --print_config"))
    assert config["model"]["init_args"]["finetuning"]["class_path"] == "tl_modules.LastStages"
    assert config["data"]["class_path"] == "datamodules.Digits"


@pytest.mark.parametrize("form", ["--model.backbone.weights null", "--model.backbone.weights=null"])
def test_a_nested_null_takes_a_configs_value_back(ok, tmp_path, form):
    (tmp_path / "a.yaml").write_text(
        "model:\n  class_path: Classification\n  init_args:\n    backbone:\n      class_path: ConvNet\n"
        "      init_args: {weights: nowhere.pth, width: 4}\n"
    )
    config = yaml.safe_load(ok(f"fit -c a.yaml {form} --data.shots_per_class null --print_config"))
    assert config["model"]["init_args"]["backbone"]["init_args"]["weights"] is None
    assert config["model"]["init_args"]["backbone"]["init_args"]["width"] == 4
    ok(f"fit -c a.yaml {form} --trainer.max_epochs 1 --data.shots_per_class 4")


def test_the_parser_still_makes_a_word_of_a_nested_null():
    """When this fails, jsonargparse is fixed and `nested_nulls` can go."""
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", skip={"schema"})
    args = ["--model", "Classification", "--model.backbone", "ConvNet", "--model.backbone.weights", "null"]
    assert parser.parse_args(args).model.init_args.backbone.init_args.weights == "None"


def test_paths_of_weights_are_absolute_in_the_config(ok, tmp_path, monkeypatch):
    ok(f"fit {SMALL} --name pre")
    for name, given in (("by_run", "runs/pre/version_0"), ("by_file", "runs/pre/version_0/checkpoints/best.ckpt")):
        ok(f"fit {SMALL} --name {name} --model.backbone.weights {given}")
        config = yaml.safe_load((version(tmp_path, name) / "config.yaml").read_text())
        assert config["model"]["init_args"]["backbone"]["init_args"]["weights"] == str(tmp_path / given)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_run(version(tmp_path, "by_run")).backbone.out_features == 16


PLACED = """
import torch
from tl_modules import ConvNet


class Placed(ConvNet):
    def __init__(self, device: torch.device, width: int = 4):
        super().__init__(width)
        self.place = device
"""


def test_a_device_is_in_the_config(ok, tmp_path):
    (tmp_path / "placed.py").write_text(PLACED)
    ok("fit --trainer.max_epochs 1 --data.shots_per_class 4 --model.backbone placed.Placed "
       "--model.backbone.device cpu --name x")  # fmt: skip
    config = yaml.safe_load((version(tmp_path, "x") / "config.yaml").read_text())
    assert config["model"]["init_args"]["backbone"]["init_args"]["device"] == "cpu"
    ok("test --run runs/x/version_0 --trust placed")


def test_what_the_config_cannot_hold_is_refused(tl, tmp_path):
    """It would be a run that nobody can load."""
    (tmp_path / "held.py").write_text(PLACED.replace("device: torch.device", "device: object = object()"))
    result = tl("fit --trainer.max_epochs 1 --data.shots_per_class 4 --model.backbone held.Placed --name x")
    assert result.code == 2, result.out
    assert "device" in result.err
    assert "Traceback" not in result.err


def test_the_end_says_what_was_kept_and_why(ok, tmp_path):
    printed = ok(f"fit {SMALL} --name x")
    metrics = read(version(tmp_path, "x"))
    assert isinstance(metrics["epoch"], int)
    assert metrics["chosen_by"] == "val/accuracy, highest"
    assert f"kept epoch {metrics['epoch']}: val/accuracy {metrics['val/accuracy']:.4g} (highest)" in printed


@pytest.mark.parametrize("line", [
    "fit --model.help Classification --trainer.max_epochs 3", "fit --model.help=Classification --trainer.max_epochs 3",
    "fit --data.help Digits --model Classification --name x", "fit --model.finetuning.help BitFit --trainer.logger false",
])  # fmt: skip
def test_options_beside_help_are_options(line, ok):
    assert "Help for --" in ok(line)


def test_the_help_of_heads_names_ours(ok, tl):
    text = " ".join(tl("fit --model.help Classification").out.split())
    known = text.partition("--model.head HEAD Class or function")[2].partition("--model.finetuning")[0]
    assert all(f"tl_modules.{name}" in known for name in ("LinearHead", "MLPHead", "CosineHead"))
    assert "torch.nn.ReLU" not in text
    assert "torch.nn.Conv2d" not in text


def test_a_trial_of_all_steps_names_no_run_to_test(ok):
    said = ok("fit --name a --trainer.fast_dev_run true --model.backbone.width 4")
    assert "fast_dev_run: all steps ran; runs/a/version_0 has no checkpoint to test" in said
    assert "tl test" not in said


def test_what_a_run_ends_with_is_what_it_has(ok, tl):
    said = ok(f"fit {SMALL} --name never --trainer.check_val_every_n_epoch 5")
    assert "runs/never/version_0 has no best.ckpt to test: no epoch was validated" in said
    assert "tl test" not in said
    said = ok("fit --run runs/never --resume --trainer.max_steps 1")  # the limit that is reached is named
    assert "has reached its end; pass --trainer.max_steps N for more" in said


@pytest.mark.slow
def test_processes_that_are_spawned_have_trained(tmp_path):
    options = "--trainer.devices 2 --trainer.strategy ddp_spawn --trainer.accelerator cpu --trainer.logger false"
    line = [sys.executable, "-m", "tl_modules", "fit", *SMALL.split(), *options.split()]
    ended = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "nothing left to train" not in ended.stdout
    assert "tl test --run runs/digits/version_0" in ended.stdout
