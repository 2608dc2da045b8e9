"""`tl calibrate`: calibrated probabilities, and unchanged predictions."""

import csv
import json
import shutil

import pytest
import torch

from datamodules import Digits
from tl_modules import load_run
from tl_modules.checkpoints.files import load_checkpoint
from tl_modules.cli.main import main

QUIET = "--trainer.enable_progress_bar false --trainer.logger false"


@pytest.fixture(scope="module")
def knows(tmp_path_factory):
    """A run that knows something, unlike one of an epoch."""
    folder = tmp_path_factory.mktemp("knows")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(f"fit --data Digits --data.source true --data.target false --model.backbone ConvNet --model.backbone.width 4 "
             f"--trainer.max_epochs 4 --name a {QUIET}".split())  # fmt: skip
    return folder / "runs" / "a" / "version_0"


@pytest.fixture
def run(knows, tmp_path):
    shutil.copytree(knows, tmp_path / "a")
    return tmp_path / "a"


def predicted(ok, name, *more):
    ok(f"predict --run a --out {name} {QUIET} {' '.join(more)}")
    with open(name) as file:
        return list(csv.DictReader(file))


def test_a_run_is_calibrated(ok, run):
    before = load_checkpoint(run / "checkpoints" / "best.ckpt")
    metrics = json.loads((run / "metrics.json").read_text())
    plain = predicted(ok, "plain.csv")
    said = ok(f"calibrate --run a {QUIET}")
    after = load_checkpoint(run / "checkpoints" / "best.ckpt")
    temperature = after["temperature"]
    assert temperature != 1
    assert f"temperature {temperature:.3f}" in said
    assert {"before", "after"} <= {line.split()[0] for line in said.splitlines() if line}
    assert after.keys() - before.keys() == {"temperature"}
    assert all(torch.equal(after["state_dict"][key], value) for key, value in before["state_dict"].items())

    written = json.loads((run / "metrics.json").read_text())
    assert {key: written[key] for key in metrics} == metrics
    assert written["calibration/nll"] < written["calibration/nll_before"]
    assert written["calibration/accuracy"] == written["calibration/accuracy_before"]
    assert written["calibration/nll_before"] == pytest.approx(metrics["val/loss"], rel=1e-3)

    # everything that loads the run has it
    module = load_run(run)
    data = Digits(source=True, target=False)
    data.collate = module.collate
    (batch,) = next(iter(data.test_dataloader())).values()
    x = batch.x
    logits = module(x)
    module.temperature = 1.0
    assert torch.allclose(logits * temperature, module(x), atol=1e-5)
    scaled = predicted(ok, "scaled.csv")
    assert [row["label"] for row in scaled] == [row["label"] for row in plain]
    p, q = (torch.tensor([[float(row[f"p_{c}"]) for c in range(10)] for row in rows]) for rows in (plain, scaled))
    assert torch.allclose((p.log() / temperature).softmax(1), q, atol=1e-3)
    assert not torch.allclose(p, q, atol=1e-2)
    ok(f"validate --run a {QUIET}")
    assert json.loads((run / "metrics.json").read_text())["val/loss"] == pytest.approx(
        written["calibration/nll"], rel=1e-3
    )

    # once more finds the same
    ok(f"calibrate --run a {QUIET}")
    assert load_checkpoint(run / "checkpoints" / "best.ckpt")["temperature"] == pytest.approx(temperature)


def test_a_run_that_goes_on_does_not_train_with_it(ok, run):
    """It belongs to the checkpoint that it was fitted to."""
    file = run / "checkpoints" / "last.ckpt"
    torch.save(torch.load(file) | {"temperature": 5.0}, file)
    ok("fit --run a --resume --trainer.max_epochs 5 --trainer.enable_progress_bar false")
    assert "temperature" not in load_checkpoint(file)


def test_values_have_no_probabilities(ok, tl):
    with open("rows.csv", "w") as file:
        csv.writer(file).writerows([["a", "y"], *([i / 40, i / 40] for i in range(40))])
    ok("fit --model Regression --model.backbone TabularMLP --data TabularData --data.target rows.csv --data.label y "
       "--data.kind values --trainer.max_epochs 1 --name v")  # fmt: skip
    refused = tl("calibrate --run runs/v")
    assert refused.code == 2
    assert "calibrate: Regression has no class probabilities to scale" in refused.err


def test_it_needs_labels(ok, tl, run):
    refused = tl("calibrate --run a --data.source false --data.target true --data.target_labels false")
    assert refused.code == 2
    assert "calibrate: the validation split has no labels" in refused.err
