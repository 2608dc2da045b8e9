"""Two processes on one machine agree with one."""

import itertools
import json
import os
import subprocess
import sys

import pytest

# tests that run side by side must not be given the same free port
PORTS = itertools.count(20000 + os.getpid() % 997 * 10)


def call(line, cwd):
    return subprocess.run(
        [sys.executable, "-m", "tl_modules", *line.split()],
        cwd=cwd,
        env=os.environ | {"MASTER_PORT": str(next(PORTS)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run(line, cwd):
    done = call(line, cwd)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("finetuning", "strategy"),
    [
        ("LastStages", "ddp"),
        pytest.param("GradualUnfreezing", "ddp_find_unused_parameters_true", marks=pytest.mark.slow),
    ],
)
def test_two_processes(finetuning, strategy, tmp_path):
    two = f"--trainer.accelerator cpu --trainer.devices 2 --trainer.strategy {strategy}"
    run(
        f"fit {two} --trainer.max_epochs 2 --model.backbone.width 4 --model.finetuning {finetuning} "
        "--data.batch_size 16 --name x",
        tmp_path,
    )
    assert [p.name for p in (tmp_path / "runs" / "x").iterdir()] == ["version_0"]
    metrics = tmp_path / "runs" / "x" / "version_0" / "metrics.json"
    reported = json.loads(metrics.read_text())
    found = []
    for devices in (two, "--trainer.devices 1 --trainer.strategy auto"):
        run(f"test --run runs/x/version_0 {devices}", tmp_path)
        found.append({k: v for k, v in json.loads(metrics.read_text()).items() if k.startswith("test/")})
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert value == pytest.approx(found[1][key], abs=1e-5), key
    predictions = []
    for devices in (two, "--trainer.devices 1 --trainer.strategy auto"):
        run(f"predict --run runs/x/version_0 {devices} --out p.csv", tmp_path)
        predictions.append([row.split(",")[:2] for row in (tmp_path / "p.csv").read_text().splitlines()])
    assert predictions[0] == predictions[1]
    run("validate --run runs/x/version_0 --trainer.devices 1 --trainer.strategy auto", tmp_path)
    again = json.loads(metrics.read_text())
    assert again["val/accuracy"] == pytest.approx(reported["val/accuracy"], abs=1e-6)


def test_a_mistake_is_said_once(tmp_path):
    line = "fit --trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp --data.shots_per_class 100"
    done = call(line, tmp_path)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.count("tl: error: shots_per_class: class 0 has") == 1
