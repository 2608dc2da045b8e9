"""Test-time adaptation through the front door."""

import csv
import json
import subprocess
import sys

import pytest


def test_commands(tl, ok, tmp_path, caplog):
    ok("fit --trainer.max_epochs 1 --model.backbone.width 4 --model.finetuning FeatureExtraction --name x")
    run = tmp_path / "runs" / "x" / "version_0"
    ok("test --run runs/x")
    plain = {k: v for k, v in json.loads((run / "metrics.json").read_text()).items() if k.startswith("test/")}
    for name in ("AdaBN", "TENT", "T3A"):
        caplog.clear()
        with caplog.at_level("INFO", "tl_modules"):
            ok(f"test --run runs/x --trainer.callbacks+={name}")
        # what is cached are the features of the backbone as it was trained
        assert any("test: features" in text for text in caplog.messages) == (name == "T3A"), caplog.messages
    metrics = json.loads((run / "metrics.json").read_text())
    assert {k: v for k, v in metrics.items() if k.startswith("test/") and k.count("/") == 1} == plain
    for name in ("AdaBN", "TENT", "T3A"):
        own = {k.replace(f"/{name.lower()}/", "/"): v for k, v in metrics.items() if f"/{name.lower()}/" in k}
        assert own.keys() == plain.keys()
        assert own["test/loss"] != plain["test/loss"]

    ok("predict --run runs/x --out plain.csv")
    ok("predict --run runs/x --out tent.csv --trainer.callbacks+=TENT --trainer.callbacks.lr 0.01")
    tables = [list(csv.reader((tmp_path / f"{name}.csv").open())) for name in ("plain", "tent")]
    assert [row[0] for row in tables[0]] == [row[0] for row in tables[1]]
    assert tables[0] != tables[1]

    both = tl("test --run runs/x --trainer.callbacks+=AdaBN --trainer.callbacks+=T3A")
    assert both.code == 2
    assert "callbacks: AdaBN and T3A both adapt the model; use one" in both.err
    wrong = tl("validate --run runs/x --trainer.callbacks+=TENT")
    assert wrong.code == 2
    assert "callbacks: TENT works only in `tl test` and `tl predict`" in wrong.err


@pytest.mark.slow
def test_two_processes(ok, tmp_path):
    """AdaBN of two processes equals that of one, except for which samples share a batch."""
    ok("fit --trainer.max_epochs 2 --model.backbone.width 4 --name x")
    losses = []
    for devices in ("1", "2 --trainer.strategy ddp"):
        command = f"test --run runs/x --trainer.accelerator cpu --trainer.devices {devices} --trainer.callbacks+=AdaBN"
        subprocess.run([sys.executable, "-m", "tl_modules", *command.split()], cwd=tmp_path, check=True, timeout=300)
        metrics = json.loads((tmp_path / "runs" / "x" / "version_0" / "metrics.json").read_text())
        losses.append(metrics["test/adabn/loss"])
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
