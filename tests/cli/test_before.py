"""Commands before a run: `tl lr-find` leaves everything as it was, `tl show-batch` shows the first training batch."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from torchvision.transforms import v2

from datamodules import Digits
from tl_modules import DANN, Classification, ConvNet, FeatureExtraction, GradualUnfreezing, TabularMLP
from tl_modules.cache import FeatureCache
from tl_modules.cli.lr_find import sweep_rates
from tl_modules.cli.trainer import TransferTrainer
from tl_modules.finetuning.lr_finder import LearningRateSweep
from tl_modules.finetuning.optimizer import NO_DECAY

SMALL = "--data.shots_per_class 4 --model.backbone.width 4"
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def trainer(**kwargs):
    return TransferTrainer(max_epochs=2, accelerator="cpu", limit_val_batches=0, **QUIET, **kwargs)


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def files(folder):
    """Every file with the time when it was last changed."""
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Witness(LearningRateSweep):
    """Records the rates of the groups, the trainable stages and the weights before the first step."""

    def __init__(self, steps=12):
        super().__init__(steps=steps)
        self.groups, self.first = [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.groups.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})
        if self.first is None:
            self.first = state(pl_module)
            self.open, self.progress = pl_module.trainable, pl_module.progress


@pytest.mark.parametrize("cached", [False, True])
def test_a_sweep_leaves_all_as_it_was(cached, tmp_path, monkeypatch):
    monkeypatch.setenv("TL_CACHE_DIR", str(tmp_path / "cache"))
    runs = []
    for sweeps in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        module, data = Classification(ConvNet(4), 10, finetuning=FeatureExtraction()), Digits(shots_per_class=4)
        cache = FeatureCache(enabled=cached, folder=str(tmp_path / "cache"))
        ours = trainer(callbacks=[cache])
        if sweeps:
            before = state(module), torch.get_rng_state(), np.random.rand(), files(tmp_path)
            np.random.seed(0)
            sweep_rates(module, data, ours, LearningRateSweep(steps=12))
            assert same(before[0], state(module))
            assert torch.equal(before[1], torch.get_rng_state())
            assert np.random.rand() == before[2]
            np.random.seed(0)
            assert files(tmp_path) == before[3]
            assert bool(before[3]) is cached
            assert module.at_end is False
        ours.fit(module, datamodule=data)
        runs.append(state(module))
    assert same(*runs)


def test_ratios_are_kept_and_all_that_will_train_is_open():
    strategy = GradualUnfreezing(lr_decay=0.5, backbone_lr=0.1)
    module = Classification(ConvNet(4), 10, finetuning=strategy, methods=[DANN()])
    sweep = Witness()
    sweep_rates(module, Digits(source=True), trainer(), sweep)
    assert sweep.open == range(3)
    assert sweep.progress == 1.0
    assert sweep.groups[0]["head"] == pytest.approx(1e-6)
    assert sweep.groups[11]["head"] == pytest.approx(1.0) or sweep.ended
    for rates in sweep.groups:
        share = {name: rate / rates["head"] for name, rate in rates.items() if not name.endswith(NO_DECAY)}
        assert share == pytest.approx({"head": 1, "dann": 1, "stage_2": 0.05, "stage_1": 0.025, "stage_0": 0.0125})


def test_a_sweep_begins_as_the_run_does_with_a_head_in_closed_form(capsys):
    backbone = ConvNet(4)
    backbone.random = False  # as a pretrained one
    module = Classification(backbone, 10, finetuning=FeatureExtraction())
    before, sweep, first = state(module), Witness(), []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            first.append(state(pl_module))

    assert sweep_rates(module, Digits(shots_per_class=4), trainer(), sweep)
    assert same(before, state(module))
    assert module.head.closed_form
    trainer(callbacks=[Look()]).fit(module, datamodule=Digits(shots_per_class=4))
    assert same(first[0], sweep.first)
    assert not torch.equal(first[0]["head.1.weight"], before["head.1.weight"])


def test_accumulated_batches_are_one_step():
    sweep = Witness(steps=10)
    module = Classification(ConvNet(4), 10, optimizer=lambda p: torch.optim.SGD(p, 1.0))
    sweep_rates(module, Digits(shots_per_class=4, batch_size=10), trainer(accumulate_grad_batches=2), sweep)
    assert len(sweep.losses) == 10
    assert len(sweep.groups) == 20
    assert sweep.losses[0] == pytest.approx(2.3, abs=0.2)  # ln 10, and not half of it


def test_lr_find_writes_a_config_that_fit_takes(ok, tmp_path):
    printed = ok(f"lr-find {SMALL} --steps 60 --max_lr 1e3 --model.optimizer SGD --name x")
    assert {p.name for p in (tmp_path / "runs" / "x").iterdir()} == {"lr_find.png", "lr_find.yaml"}
    text = (tmp_path / "runs/x/lr_find.yaml").read_text()
    assert text.strip() in printed
    rate = yaml.safe_load(text)["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    ok(f"fit {SMALL} --model.optimizer SGD --trainer.max_steps 1 --name x -c runs/x/lr_find.yaml")
    config = yaml.safe_load((tmp_path / "runs/x/version_0/config.yaml").read_text())["model"]["init_args"]
    assert config["optimizer"]["init_args"]["lr"] == rate
    ok("lr-find --run runs/x --steps 10 --out again")  # the config of a run, from its start
    assert (tmp_path / "again" / "lr_find.png").is_file()
    assert {p.name for p in (tmp_path / "runs" / "x").iterdir()} == {"lr_find.png", "lr_find.yaml", "version_0"}


def test_a_cycle_has_its_rate_in_the_scheduler(ok, tmp_path):
    cycle = "--model.lr_scheduler OneCycleLR --model.lr_scheduler.max_lr 0.1 --model.lr_scheduler.total_steps 9"
    ok(f"lr-find {SMALL} --steps 60 --max_lr 1e3 --model.optimizer SGD --name x {cycle}")
    arguments = yaml.safe_load((tmp_path / "runs/x/lr_find.yaml").read_text())["model"]["init_args"]
    assert arguments["lr_scheduler"]["init_args"].keys() == {"max_lr"}


DIES = """
import torch
from tl_modules import Classification


class Dies(Classification):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_step == 20 else 0 * loss + 1
"""


def test_a_loss_that_is_not_finite_ends_it_and_no_fall_is_said(ok, module_file, tmp_path):
    module_file("dies", DIES)
    printed = ok(f"lr-find --model dies.Dies --model.backbone ConvNet {SMALL} --name x")
    assert "the loss falls at no rate from 1e-06 to 1; keep your current rate" in printed
    assert "not finite" in printed
    assert [p.name for p in (tmp_path / "runs" / "x").iterdir()] == ["lr_find.png"]


def test_show_batch_is_the_first_training_batch(tmp_path):
    seen = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.update({name: part for name, part in batch.items() if name not in seen})

    augment = [v2.RandomRotation(30), v2.RandomHorizontalFlip()]
    trainer(callbacks=[Look()]).fit(Classification(ConvNet(4), 10), Digits(source=True, augment=augment))
    torch.manual_seed(5)  # which must not matter
    loaders = Digits(source=True, augment=augment).train_dataloader().iterables
    for name, loader in loaders.items():
        pairs = loader.first(16)
        assert len(pairs) == 16
        for (x, y), other in zip(pairs, seen[name].x, strict=False):
            assert torch.equal(x, other)
            assert (y is None) == (name == "target")


def test_show_batch_writes_one_picture_and_no_run(ok, tmp_path):
    printed = ok("show-batch --data.source true --model.backbone.width 4")
    assert "source and target: runs/digits/batch.png" in printed
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*")) if p.is_file()] == [
        "runs/digits/batch.png"
    ]
    np.savetxt(
        tmp_path / "t.csv", np.arange(60).reshape(20, 3) % 7, delimiter=",", header="a,b,y", comments="", fmt="%d"
    )
    ok("show-batch --data TabularData --data.target t.csv --data.label y --model Regression "
       "--model.backbone TabularMLP --out pictures/t.png --count 4")  # fmt: skip
    assert Path("pictures/t.png").read_bytes()[:4] == b"\x89PNG"


def test_a_sample_is_drawn_with_its_label_or_a_question_mark():
    from matplotlib.figure import Figure

    schema = {"x": {"numeric": ["age", "hours"]}, "y": {"classes": ["cat", "dog"]}}
    module = Classification(TabularMLP(), schema)
    axes = Figure().add_subplot()
    assert module.draw(axes, torch.tensor([38.0, 40.5]), 1, None) == "dog"
    assert [text.get_text() for text in axes.texts] == ["age  38\nhours  40.5"]
    dark = torch.full((1, 4, 4), 51, dtype=torch.uint8)
    assert module.draw(axes, dark, None, None) == "?"
    (shown,) = axes.images
    assert float(shown.norm(shown.get_array().max())) == pytest.approx(0.2)  # no stretching
    assert module.draw(axes, dark, 0, torch.tensor([[0.1, 0.9]])) == "cat \u2192 dog"
