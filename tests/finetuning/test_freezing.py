"""What is frozen stays bit-identical through the front door: parameters, BatchNorm buffers, modes."""

import hashlib

import pytest
import torch
from lightning.pytorch import Callback

from tl_modules import (
    Classification,
    ConvNet,
    FeatureExtraction,
    FreezeThenUnfreeze,
    Full,
    GradualUnfreezing,
    LastStages,
    UserError,
)

DEPTHS = [
    (Full(), [4, 4, 4, 4, 4, 4]),
    (FeatureExtraction(), [0, 0, 0, 0, 0, 0]),
    (LastStages(3), [3, 3, 3, 3, 3, 3]),
    (LastStages(9), [4, 4, 4, 4, 4, 4]),
    (GradualUnfreezing(1), [0, 1, 2, 3, 4, 4]),
    (GradualUnfreezing(2), [0, 0, 1, 1, 2, 2]),
    (FreezeThenUnfreeze(2), [0, 0, 4, 4, 4, 4]),
]


@pytest.mark.parametrize(("strategy", "depths"), DEPTHS)
def test_depth(strategy, depths):
    assert [strategy.depth(epoch, 4) for epoch in range(6)] == depths
    assert strategy.opens_later(4) == (depths[0] != 4 and not isinstance(strategy, FeatureExtraction | LastStages))


def digests(module, prefix):
    """sha256 of every tensor and buffer under a prefix."""
    return {
        name: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in module.state_dict().items()
        if name.startswith(prefix)
    }


class Watch(Callback):
    """Notes each stage's digest and modes at the end of every epoch."""

    def __init__(self):
        self.epochs = []
        self.modes = []

    def on_train_start(self, trainer, pl_module):
        self.epochs.append([digests(pl_module, f"backbone.model.{i}") for i in range(3)])

    def on_train_batch_end(self, trainer, pl_module, *args):
        bn = [m for m in pl_module.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        self.modes.append([m.training for m in bn])

    def on_train_epoch_end(self, trainer, pl_module):
        self.on_train_start(trainer, pl_module)


@pytest.mark.parametrize(
    ("strategy", "depths"),
    [
        (FeatureExtraction(), [0, 0, 0]),
        (LastStages(1), [1, 1, 1]),
        (GradualUnfreezing(1), [0, 1, 2]),
        (FreezeThenUnfreeze(1), [0, 3, 3]),
        (Full(), [3, 3, 3]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_closed_stages_do_not_move(strategy, depths):
    from lightning.pytorch import Trainer, seed_everything

    from datamodules import Digits

    seed_everything(0)
    watch = Watch()
    module = Classification(ConvNet(4), 10, finetuning=strategy)
    trainer = Trainer(
        max_epochs=3, callbacks=[watch], logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, Digits(batch_size=64))
    batches = len(watch.modes) // 3
    for epoch, depth in enumerate(depths):
        for stage in range(3):
            same = watch.epochs[epoch][stage] == watch.epochs[epoch + 1][stage]
            assert same == (stage < 3 - depth), (epoch, stage)
        expected = [stage >= 3 - depth for stage in range(3) for _ in range(2)]
        assert all(modes == expected for modes in watch.modes[epoch * batches : (epoch + 1) * batches])


def test_a_frozen_run_of_the_command_line_keeps_its_backbone(ok, tmp_path):
    ok("fit --name a --data.source true --data.target false --trainer.max_epochs 1 --model.backbone.width 4")
    ok(
        "fit --name b --trainer.max_epochs 2 --model.backbone.width 4 --model.finetuning FeatureExtraction "
        "--model.backbone.weights runs/a/version_0"
    )
    before, after = (
        torch.load(tmp_path / f"runs/{n}/version_0/checkpoints/{c}.ckpt", weights_only=True)["state_dict"]
        for n, c in (("a", "best"), ("b", "last"))
    )
    for name in (k for k in before if k.startswith("backbone")):
        digest = [hashlib.sha256(s[name].numpy().tobytes()).hexdigest() for s in (before, after)]
        assert digest[0] == digest[1], name
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_an_equal_bias_stays_in_the_optimizer():
    module = Classification(ConvNet(4), 10, finetuning=GradualUnfreezing(lr_decay=0.5))
    optimizer = module.configure_optimizers()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}  # ConvNet's BatchNorm biases are all zero, equal by value
    assert [g["name"] for g in optimizer.param_groups] == ["head", "stage_2", "stage_1", "stage_0"]
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 5e-4, 2.5e-4, 1.25e-4]


def test_one_cycle_keeps_its_groups_through_every_opening(ok, tmp_path):
    ok(
        "fit --name s --trainer.max_epochs 4 --model.backbone.width 4 --model.finetuning GradualUnfreezing "
        "--data.shots_per_class 4 --model.lr_scheduler torch.optim.lr_scheduler.OneCycleLR "
        "--model.lr_scheduler.max_lr 0.01 --model.lr_scheduler.total_steps 8"
    )
    state = torch.load(tmp_path / "runs/s/version_0/checkpoints/last.ckpt", weights_only=True)
    assert state["lr_schedulers"][0]["last_epoch"] == 8
    assert len(state["optimizer_states"][0]["param_groups"]) == 4


@pytest.mark.parametrize("wrong", [0, -1, 1.5])
def test_lr_decay_has_a_range(wrong):
    with pytest.raises(UserError, match="lr_decay"):
        Full(lr_decay=wrong)
