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
def test_two_processes(finetuning, strategy, ok, tmp_path):
    two = f"--trainer.accelerator cpu --trainer.devices 2 --trainer.strategy {strategy}"
    one = "--trainer.devices 1 --trainer.strategy auto"
    run(
        f"fit {two} --trainer.max_epochs 2 --model.backbone.width 4 --model.finetuning {finetuning} "
        "--data.batch_size 16 --name x",
        tmp_path,
    )
    assert [p.name for p in (tmp_path / "runs" / "x").iterdir()] == ["version_0"]
    metrics = tmp_path / "runs" / "x" / "version_0" / "metrics.json"
    reported = json.loads(metrics.read_text())
    for command, options in (("test", ""), ("predict", "--out two.csv")):
        run(f"{command} --run runs/x/version_0 {two} {options}", tmp_path)
    by_two = json.loads(metrics.read_text())
    for command, options in (("test", ""), ("validate", ""), ("predict", "--out one.csv")):
        ok(f"{command} --run runs/x/version_0 {one} {options}")
    by_one = json.loads(metrics.read_text())
    assert by_one.keys() == by_two.keys()
    for key, value in by_one.items():
        assert value == pytest.approx(by_two[key], abs=1e-5), key
    assert by_one["val/accuracy"] == pytest.approx(reported["val/accuracy"], abs=1e-6)
    rows = [[row.split(",")[:2] for row in (tmp_path / f"{n}.csv").read_text().splitlines()] for n in ("one", "two")]
    assert rows[0] == rows[1]


def test_a_mistake_is_said_once(tmp_path):
    line = "fit --trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp --data.shots_per_class 100"
    done = call(line, tmp_path)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.count("tl: error: shots_per_class: class 0 has") == 1


def test_lightning_still_rounds_the_batch_size_of_uneven_ranks():
    """When this fails, issue 21859 of Lightning is mended and `sync_dist` can log the evaluation's loss."""
    import inspect

    from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric

    assert "self.meta.sync(self.cumulated_batch_size)" in inspect.getsource(_ResultMetric.compute)
