"""Pretraining by `tl`: fit, resume, test, embed, and the run that takes its backbone."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.append(str(Path(__file__).parents[1] / "exact"))
from harness import call as tl_in_process
from harness import compare

FIT = "fit --data Digits --model.backbone ConvNet --model.backbone.width 4 --trainer.max_epochs 1 --name a "
SMALL = {"GAN": "--model.width 4 --model.latent 8", "Autoencoder": "--model.width 4"}


def fit(model, more=""):
    return f"{FIT.replace('--model.backbone ConvNet', f'--model {model} --model.backbone ConvNet')} {SMALL.get(model, '')} {more}"


def metrics(tmp_path, name="a"):
    return json.loads((tmp_path / "runs" / name / "version_0" / "metrics.json").read_text())


def test_a_run_and_what_comes_after_it(ok, tl, tmp_path):
    said = ok(fit("SimCLR"))
    assert "449 train without labels, 144 val" in said
    assert "kept epoch 0: val/knn" in said
    config = (tmp_path / "runs/a/version_0/config.yaml").read_text()
    assert "augment: views" in config
    ok("test --run runs/a")
    assert {"val/knn", "val/loss", "val/spread", "test/knn", "test/spread"} <= metrics(tmp_path).keys()
    refused = tl("predict --run runs/a")
    assert refused.code == 2
    assert "predict: SimCLR has learnt features, no labels; write the features with `tl embed" in refused.err
    ok("embed --run runs/a --out features")
    assert load_file(tmp_path / "features/features.safetensors")["features"].shape[1] == 16
    ok(f"{FIT.replace('--name a', '--name b')} --model.backbone.weights runs/a --model.finetuning FeatureExtraction")
    kept = [torch.load(tmp_path / f"runs/{n}/version_0/checkpoints/best.ckpt", weights_only=True) for n in "ab"]
    one, other = (file["state_dict"] for file in kept)
    assert all(torch.equal(one[k], other[k]) for k in one if k.startswith("backbone."))
    assert 0 <= metrics(tmp_path, "b")["val/accuracy"] <= 1


def test_images_and_texts(ok, tl, tmp_path):
    """CLIP predicts among given classes, for images without texts."""
    pytest.importorskip("polars")
    names, shades = ["black", "grey", "white"], np.arange(24, dtype=np.uint8) % 3 * 100
    np.savez(tmp_path / "i.npz", images=np.broadcast_to(shades[:, None, None, None], (24, 8, 8, 3)))
    rows = [f"a {names[i % 3]} wall,{names[i % 3]}" for i in range(24)]
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *rows]))
    (tmp_path / "new.csv").write_text("\n".join(["number", *map(str, range(24))]))
    (tmp_path / "v.txt").write_text("".join(f"{word} {i} {i * i}\n" for i, word in enumerate(["a", "wall", *names])))
    parts = {"image": {"class_path": "ConvNet", "init_args": {"width": 4}}}
    parts["text"] = {"class_path": "WordVectors", "init_args": {"name": "v.txt"}}
    backbone = {"class_path": "SeveralBackbones", "init_args": {"parts": parts}}
    (tmp_path / "m.yaml").write_text(json.dumps({"model": {"class_path": "CLIP", "init_args": {"backbone": backbone}}}))
    ok(
        "fit -c m.yaml --data Paired --data.target t.csv --data.text text --data.image i.npz --data.label label "
        "--data.augment light --trainer.max_epochs 1 --name a"
    )
    new = "predict --run runs/a --data.target new.csv --data.label null --model.classes [white,black] --out p.csv "
    assert "SeveralBackbones takes image, text by name" in tl(f"{new} --data.text null").err
    ok(f"{new} --data.without [text]")
    assert (tmp_path / "p.csv").read_text().startswith("id,label,p_white,p_black")


@pytest.mark.tensorboard
@pytest.mark.parametrize(("model", "title"), [("GAN", "generated"), ("Autoencoder", "restored: destroyed above")])
def test_pictures(model, title, ok, tmp_path):
    ok(fit(model, "--trainer.limit_train_batches 2"))
    events = EventAccumulator(str(tmp_path / "runs/a/version_0"), size_guidance={"images": 0})
    events.Reload()
    assert title in events.Tags()["images"]


@pytest.mark.parametrize("model", ["GAN", "DINO"])
def test_an_interrupted_run_goes_on_to_the_bit(model, tmp_path, monkeypatch):
    """By a signal within an epoch, as `tests/exact` does it."""
    monkeypatch.chdir(tmp_path)
    line = fit(model, "--trainer.logger false --trainer.max_epochs 2 --trainer.limit_train_batches 7 --trust harness ")
    line += "--trainer.enable_progress_bar false --trainer.callbacks+=harness.Interrupt --trainer.callbacks.at {at}"
    assert tl_in_process(line.format(at=-1)) == 0
    assert tl_in_process(line.replace("--name a", "--name b").format(at=10)) == 143
    assert tl_in_process("fit --run runs/b --resume --trust harness") == 0
    assert compare(tmp_path / "runs/a/version_0", tmp_path / "runs/b/version_0") == []


def test_views_can_be_seen_before(ok, tmp_path):
    ok("show-batch --data Digits --model SimCLR --model.backbone ConvNet --out batch.png")
    assert (tmp_path / "batch.png").is_file()
