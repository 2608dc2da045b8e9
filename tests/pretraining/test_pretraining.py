"""Every pretraining by every kind of data, strategy and interruption; a new one is tested by existing."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
import unlabelled
from lightning.pytorch import Callback
from small_runs import exported, fit, same
from unlabelled import CASES, PRETRAININGS, Unlabelled, backbone_of, build

from datamodules.errors import DataError
from tl_modules import (
    GAN,
    SCARF,
    Autoencoder,
    Classification,
    FeatureExtraction,
    FineTuning,
    LastStages,
    SimCLR,
    TimmBackbone,
    TorchvisionBackbone,
    UserError,
    VICReg,
)

every_case = pytest.mark.parametrize(("pretraining", "kind"), CASES, ids=lambda v: getattr(v, "__name__", v))
every_pretraining = pytest.mark.parametrize("pretraining", PRETRAININGS, ids=lambda c: c.__name__)


class Losses(Callback):
    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(float(trainer.callback_metrics["train/loss"]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each case once: the module, its Trainer, and the folder with the checkpoint of step 5."""
    made = {}

    def of(pretraining, kind):
        if (pretraining, kind) not in made:
            folder = tmp_path_factory.mktemp("run")
            module, losses = build(pretraining, kind), Losses()
            trainer = fit(module, Unlabelled(kind), folder, callbacks=[losses])
            made[pretraining, kind] = module, trainer, folder, losses.epochs
        return made[pretraining, kind]

    return of


@every_case
def test_a_resumed_run_is_the_undisturbed_one(pretraining, kind, runs):
    whole, _, folder, _ = runs(pretraining, kind)
    assert all(torch.isfinite(t).all() for t in whole.state_dict().values() if t.is_floating_point())
    resumed = build(pretraining, kind)
    torch.manual_seed(1)  # whatever it was, the checkpoint's random numbers count
    fit(resumed, Unlabelled(kind), ckpt_path=folder / "step=5.ckpt")
    assert same(whole.state_dict(), resumed.state_dict()) == []


@every_case
def test_it_is_watched_and_all_of_the_backbone_moves(pretraining, kind, runs):
    module, trainer, _, losses = runs(pretraining, kind)
    metrics = trainer.callback_metrics
    assert {"train/loss", "val/loss", "val/knn", "val/spread"} <= metrics.keys()
    assert all(np.isfinite(float(value)) for value in metrics.values())
    assert trainer.global_step == 6
    assert module.monitor == (("val/loss", "min") if module.head_is_used else ("val/knn", "max"))
    start = build(pretraining, kind)
    moved = same(dict(start.backbone.named_parameters()), dict(module.backbone.named_parameters()))
    assert set(moved) == set(dict(module.backbone.named_parameters()))
    assert len(losses) == 2


@every_case
def test_its_loss_falls(pretraining, kind):
    losses = Losses()
    module = build(pretraining, kind, optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3), lr_scheduler=None)
    fit(module, Unlabelled(kind), callbacks=[losses], epochs=8, limit_val_batches=0)
    assert losses.epochs[-1] < losses.epochs[0]


@pytest.mark.product(3)
@pytest.mark.parametrize("strategy", exported(FineTuning), ids=lambda c: c.__name__)
@every_case
def test_its_backbone_goes_on_with_every_strategy(pretraining, kind, strategy, runs):
    folder = runs(pretraining, kind)[2]
    weights = str(folder / "step=5.ckpt")
    backbone = backbone_of(kind, weights)
    kept = torch.load(weights, weights_only=True)["state_dict"]
    taken = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    assert [n for n in same(taken, {k: v for k, v in kept.items() if k in taken}) if "num_batches" not in n] == []
    task = Classification(backbone, {"y": {"classes": ["a", "b", "c"]}}, finetuning=strategy())
    assert not task.head_transferred
    assert not task.backbone.random
    trainer = fit(task, Unlabelled(kind), epochs=1)
    assert np.isfinite(float(trainer.callback_metrics["val/accuracy"]))


@every_case
def test_labels_move_no_weight(pretraining, kind, runs):
    other = build(pretraining, kind)
    fit(other, Unlabelled(kind, labels=lambda y: (y + 1) % 3))
    assert same(runs(pretraining, kind)[0].state_dict(), other.state_dict()) == []


def test_training_has_no_labels():
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch["target"])

    fit(build(SimCLR), Unlabelled(), callbacks=[Look()], epochs=1)
    assert all(part.y is None for part in seen)
    one, other = seen[0].x
    assert one.shape == other.shape == (8, 1, 12, 12)
    assert not torch.equal(one, other)


def test_without_any_label_its_loss_chooses():
    from tl_modules.evaluation import ModelSelection

    module = build(SimCLR)
    trainer = fit(module, Unlabelled(target_labels=False), callbacks=[ModelSelection()], epochs=1)
    assert module.monitor == ("val/loss", "min")
    assert "val/knn" not in trainer.callback_metrics
    assert "val/loss" in trainer.callback_metrics
    assert build(SimCLR, schema={"y": {"boxes": ["car"]}}).monitor == ("val/loss", "min")


def test_values_are_labels_too():
    module = build(VICReg, schema={"y": {"values": 1}})
    trainer = fit(module, Unlabelled(classes=False), epochs=1)
    assert float(trainer.callback_metrics["val/knn"]) < 1


def test_several_domains_teach_together():
    names = ("source/a", "source/b", "target")
    trainer = fit(build(SimCLR), Unlabelled(domains=names), epochs=1)
    assert {"val/knn", "val/loss"} <= trainer.callback_metrics.keys()


def test_a_part_of_the_stages_can_be_pretrained():
    module = build(SimCLR, finetuning=LastStages(1))
    before = {k: v.clone() for k, v in module.backbone.state_dict().items()}
    fit(module, Unlabelled(), epochs=1)
    assert {name.split(".")[1] for name in same(before, module.backbone.state_dict())} == {"2"}
    with pytest.raises(UserError, match="finetuning: FeatureExtraction freezes the whole backbone"):
        build(SimCLR, finetuning=FeatureExtraction())


@pytest.mark.parametrize("backbone", ["transformer of timm", "network of torchvision"])
@pytest.mark.parametrize("pretraining", [p for p, kind in CASES if kind == "image"], ids=lambda c: c.__name__)
def test_foreign_backbones(pretraining, backbone):
    of_timm = backbone == "transformer of timm"
    network = TimmBackbone("test_vit") if of_timm else TorchvisionBackbone("shufflenet_v2_x0_5")
    size = 160 if of_timm else 32
    options = {"image_size": size, "width": 2} if pretraining in unlabelled.SMALL else {}
    module = pretraining(network, schema={"x": {"image": {}}, "y": {"values": 1}}, **options)
    if pretraining is Autoencoder:
        assert module.masked == (0.5 if of_timm else 0)
    views = [torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8) for _ in range(module.views)]
    sum(module.objective(*views).values()).backward()
    assert all(p.grad is not None for p in network.parameters())


def test_a_collapse_is_said_once(caplog):
    module = build(VICReg, variance=0.0, covariance=0.0)
    with torch.no_grad():  # features that no longer depend on the input
        norm = module.backbone.model[2][4]
        norm.weight.zero_()
        norm.bias.fill_(1.0)
    module.optimizer = lambda params: torch.optim.SGD(params, lr=1e-6)
    fit(module, Unlabelled())
    said = [r.getMessage() for r in caplog.records if "collapsed" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("epoch 0: the features have collapsed to one direction (val/spread")
    caplog.clear()
    fit(build(VICReg), Unlabelled())
    assert "collapsed" not in caplog.text


@pytest.mark.parametrize(("words", "match"), [
    (lambda: build(SCARF, "image"), "SCARF swaps values of columns"),
    (lambda: build(GAN, "vector"), "GAN generates images"),
    (lambda: build(SimCLR, temperature=0.0), "temperature: 0.0 must be above 0"),
    (lambda: build(Autoencoder, masked=1.0), r"noise, masked: .* 1.0 in \[0, 1\)"),
    (lambda: fit(build(SimCLR), Unlabelled(augment="none")), "augment: pretraining compares views"),
])  # fmt: skip
def test_mistakes_are_said(words, match):
    with pytest.raises((UserError, DataError), match=match):
        words()


def test_a_missing_lightly_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lightly", None)
    with pytest.raises(UserError, match=r"SimCLR needs lightly: pip install 'lightning-transfer\[ssl\]'"):
        build(SimCLR)


@every_pretraining
def test_every_argument_has_its_words(pretraining):
    documented = inspect.getdoc(pretraining) or ""
    for name in inspect.signature(pretraining.__init__).parameters:
        assert name == "self" or f"{name}:" in documented, name


@pytest.mark.slow
def test_every_pretraining_on_two_processes(two_ranks):
    """Both ranks have the same parameters after each of them, and again after an interruption."""
    one, two = two_ranks(Path(unlabelled.__file__), "pretraining", 1200)
    assert len(one) == 2 * len(CASES)
    assert {name: value for name, value in one.items() if isinstance(value, str)} == {}
    assert one == two
    assert all(one[f"{name.removesuffix(' whole')} resumed"] == value for name, value in one.items() if "whole" in name)
