"""What is frozen stays bit-identical through the front door: parameters, BatchNorm buffers, modes."""

import hashlib

import pytest
import torch
from lightning.pytorch import Callback
from methods.cases import Several, fit, same

from tl_modules import (
    Backbone,
    BitFit,
    Classification,
    ConvNet,
    FeatureExtraction,
    FirstStages,
    FreezeThenUnfreeze,
    FullFineTuning,
    GradualUnfreezing,
    LastStages,
    NormOnly,
    UserError,
)
from tl_modules.finetuning.optimizer import NO_DECAY

DEPTHS = [
    (FullFineTuning(), [4, 4, 4, 4, 4, 4]),
    (FeatureExtraction(), [0, 0, 0, 0, 0, 0]),
    (LastStages(3), [3, 3, 3, 3, 3, 3]),
    (LastStages(9), [4, 4, 4, 4, 4, 4]),
    (GradualUnfreezing(1), [0, 1, 2, 3, 4, 4]),
    (GradualUnfreezing(2), [0, 0, 1, 1, 2, 2]),
    (FreezeThenUnfreeze(2), [0, 0, 4, 4, 4, 4]),
    (GradualUnfreezing(2, "steps"), [0, 0, 1, 1, 2, 2]),
    (FreezeThenUnfreeze(3, "steps"), [0, 0, 0, 4, 4, 4]),
]


@pytest.mark.parametrize(("strategy", "depths"), DEPTHS)
def test_depth(strategy, depths):
    assert [strategy.trainable_stages(epoch, 4) for epoch in range(6)] == [range(4 - depth, 4) for depth in depths]
    assert strategy.opens_later(4) == (depths[0] != 4 and not isinstance(strategy, FeatureExtraction | LastStages))


@pytest.mark.parametrize(("strategy", "depths"), [
    (GradualUnfreezing(0.1, "fraction"), [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 4]),
    (GradualUnfreezing(0.3, "fraction"), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]),
    (FreezeThenUnfreeze(0.5, "fraction"), [0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4]),
])  # fmt: skip
def test_depth_by_fraction(strategy, depths):
    found = [strategy.trainable_stages(tenths / 10, 4) for tenths in range(11)]
    assert found == [range(4 - depth, 4) for depth in depths]
    assert strategy.opens_later(4)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: GradualUnfreezing(0), "every: 0 must be a whole number of epochs"),
    (lambda: GradualUnfreezing(0.5), "every: 0.5 must be a whole number of epochs, at least 1 .or pass unit: fraction"),
    (lambda: GradualUnfreezing(2, "fraction"), "every: 2 is not a fraction"),
    (lambda: FreezeThenUnfreeze(1.5, "steps"), "after: 1.5 must be a whole number of steps"),
])  # fmt: skip
def test_how_long_has_a_range(make, message):
    with pytest.raises(UserError, match=message):
        make()


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
        (FullFineTuning(), [3, 3, 3]),
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


class Standardised(Backbone):
    """A BatchNorm without weights before the first stage, and a counter, both of no stage."""

    out_features = 4

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(5, affine=False)
        self.layers = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 4))
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.passes += 1
        return self.layers(self.norm(x))

    def stages(self):
        return list(self.layers)


@pytest.mark.parametrize(("strategy", "moves"), [(FeatureExtraction(), 0), (LastStages(1), 0), (FullFineTuning(), 1)],
                         ids=lambda v: type(v).__name__)  # fmt: skip
@pytest.mark.parametrize("cached", [True, False])
def test_buffers_of_no_stage_rest_while_anything_is_closed(strategy, moves, cached):
    module = Classification(Standardised(), 3, finetuning=strategy)
    before = {k: v.clone() for k, v in module.backbone.state_dict().items() if not k.startswith("layers")}
    fit(module, Several("vector", ("target",)), cached=cached)
    moved = same({k: module.backbone.state_dict()[k] for k in before}, before)
    assert set(moved) == (set(before) if moves else set())


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
    assert not torch.equal(before["head.1.weight"], after["head.1.weight"])


def named_rates(groups):
    """Of each part; those without decay have the rate of their part."""
    rates = {group["name"]: group["lr"] for group in groups}
    parts = {name: rate for name, rate in rates.items() if not name.endswith(NO_DECAY)}
    assert all(rates[name] == parts[name.removesuffix(NO_DECAY)] for name in rates)
    return parts


def test_an_equal_bias_stays_in_the_optimizer():
    module = Classification(ConvNet(4), 10, finetuning=GradualUnfreezing(lr_decay=0.5))
    optimizer = module.configure_optimizers()["optimizer"]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}  # ConvNet's BatchNorm biases are all zero, equal by value
    wanted = {"head": 3e-3, "stage_2": 1.5e-3, "stage_1": 7.5e-4, "stage_0": 3.75e-4}
    assert named_rates(optimizer.param_groups) == wanted


def test_one_cycle_keeps_its_groups_through_every_opening(ok, tmp_path):
    ok(
        "fit --name s --trainer.max_epochs 4 --model.backbone.width 4 --model.finetuning GradualUnfreezing "
        "--data.shots_per_class 4 --model.lr_scheduler torch.optim.lr_scheduler.OneCycleLR "
        "--model.lr_scheduler.max_lr 0.01 --model.lr_scheduler.total_steps 8"
    )
    state = torch.load(tmp_path / "runs/s/version_0/checkpoints/last.ckpt", weights_only=True)
    assert state["lr_schedulers"][0]["last_epoch"] == 8
    assert len(named_rates(state["optimizer_states"][0]["param_groups"])) == 4


SMALL = "fit --name s --trainer.max_epochs 4 --model.backbone.width 4 --data.shots_per_class 4 --data.batch_size 16 "
GRADUAL = "--model.finetuning GradualUnfreezing --model.finetuning.lr_decay 0.5 "
SCHEDULE = "--model.lr_scheduler torch.optim.lr_scheduler."


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [("OneCycleLR", "max_lr 0.01 total_steps 12"), ("CyclicLR", "base_lr 0.001 max_lr 0.01 step_size_up 3")],
)
def test_a_cycle_keeps_each_groups_share_through_every_opening(scheduler, options, ok, tmp_path):
    words = options.split()
    given = " ".join(f"--model.lr_scheduler.{k} {v}" for k, v in zip(words[::2], words[1::2], strict=True))
    ok(SMALL + GRADUAL + SCHEDULE + scheduler + " " + given)
    import csv

    rows = list(csv.DictReader((tmp_path / "runs/s/version_0/metrics.csv").open()))
    assert len({row["lr/head"] for row in rows}) > 1
    for row in rows:
        rates = [float(row[f"lr/{name}"]) for name in ("head", "stage_2", "stage_1", "stage_0")]
        assert rates == pytest.approx([rates[0] / 2**i for i in range(4)])


def test_a_plateau_lowers_every_group_and_is_in_the_epochs_checkpoint(ok, tmp_path):
    ok(SMALL + GRADUAL + SCHEDULE + "ReduceLROnPlateau "
       "--model.lr_scheduler.patience 0 --model.lr_scheduler.mode max --model.lr_scheduler.threshold 10")  # fmt: skip
    state = torch.load(tmp_path / "runs/s/version_0/checkpoints/last.ckpt", weights_only=True)
    assert state["lr_schedulers"][0]["last_epoch"] == 4
    rates = list(named_rates(state["optimizer_states"][0]["param_groups"]).values())
    assert rates == pytest.approx([3e-6, 1.5e-6, 7.5e-7, 3.75e-7])  # lowered tenfold after epochs 1, 2 and 3


def test_lightning_still_steps_a_plateau_after_the_epochs_checkpoint():
    """When this fails, `lr_scheduler_step` and `on_train_epoch_end` of TransferModule can leave the plateau to Lightning."""
    import inspect

    from lightning.pytorch.loops import _FitLoop

    source = inspect.getsource(_FitLoop.on_advance_end)
    assert source.index('"on_train_epoch_end", monitoring_callbacks=True') < source.index("update_lr_schedulers")


def test_warm_up_and_cosine_live_through_every_opening():
    from lightning.pytorch import Trainer
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

    from datamodules import Digits

    def schedule(optimizer):
        return SequentialLR(optimizer, [LinearLR(optimizer, 0.1, total_iters=2), CosineAnnealingLR(optimizer, 4)], [2])

    module = Classification(ConvNet(4), 10, finetuning=GradualUnfreezing(lr_decay=0.5), lr_scheduler=schedule)
    trainer = Trainer(max_epochs=4, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, Digits(shots_per_class=2))
    rates = list(named_rates(trainer.optimizers[0].param_groups).values())
    assert rates == pytest.approx([rates[0] / 2**i for i in range(4)])
    assert rates[0] == pytest.approx(3e-3 / 2)


@pytest.mark.parametrize(("unit", "every", "steps"), [("steps", 3, [3, 6, 9]), ("fraction", 0.25, [3, 6, 9])])
def test_stages_open_within_an_epoch(unit, every, steps, ok):
    printed = ok(f"{SMALL} {GRADUAL} --model.finetuning.unit {unit} --model.finetuning.every {every}")
    opened = [
        int(line.split("step ")[1].split(":")[0])
        for line in printed.splitlines()
        if "step " in line and "unfreezes" in line
    ]
    assert opened == steps


def test_a_fraction_needs_an_end(tl):
    result = tl(f"{SMALL} --model.finetuning FreezeThenUnfreeze --model.finetuning.unit fraction "
                "--model.finetuning.after .5 --trainer.max_epochs -1")  # fmt: skip
    assert result.code == 2
    assert "fractions of the run, needs the run's end" in result.err


@pytest.mark.parametrize("wrong", [0, -1, 1.5])
def test_lr_decay_has_a_range(wrong):
    with pytest.raises(UserError, match="lr_decay"):
        FullFineTuning(lr_decay=wrong)


class Tied(Backbone):
    """The first and the last stage share a weight."""

    out_features = 4

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        self.layers[2].weight = self.layers[0].weight

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def stages(self):
        return list(self.layers)


def test_what_two_stages_share_belongs_to_the_first():
    module = Classification(Tied(), 3, finetuning=LastStages(1))
    shared, bias = module.backbone.layers[0].weight, module.backbone.layers[2].bias
    assert not shared.requires_grad
    assert bias.requires_grad
    groups = {group["name"]: [id(p) for p in group["params"]] for group in module.finetuning.param_groups(module)}
    assert id(shared) in groups["stage_0"]
    assert groups["stage_2"] == [id(bias)]
    module.open_stages()
    assert "backbone.layers.0.weight" in module.finetuning.frozen_tensors(module)["stage_0"]


@pytest.mark.parametrize(
    ("strategy", "kind"), [(BitFit(), "bias"), (NormOnly(), "norm")], ids=lambda v: type(v).__name__
)
def test_part_of_the_parameters_trains(strategy, kind):
    """The rest is as it was to the bit, is not in the optimizer, and is left out of small checkpoints."""
    module = Classification(ConvNet(4), 3, finetuning=strategy, checkpoint_weights="trainable")
    norms = {f"backbone.{n}" for n, m in module.backbone.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    trains = {
        name for name, _ in module.named_parameters()
        if name.startswith("head.") or (name.endswith(".bias") if kind == "bias" else name.rpartition(".")[0] in norms)
    }  # fmt: skip
    before = {name: p.clone() for name, p in module.named_parameters()}
    trainer = fit(module, Several("image", ("target",)))
    assert {name for name, p in module.named_parameters() if not torch.equal(p, before[name])} == trains
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for name, p in module.named_parameters() if name in trains}
    frozen = module.finetuning.frozen_tensors(module)
    assert {name for named in frozen.values() for name in named} == before.keys() - trains
    assert module.finetuning.never_trains(module).keys() == before.keys() - trains


def test_the_first_stages_train_alone():
    module = Classification(ConvNet(4), 3, finetuning=FirstStages(1))
    module.train()
    assert [stage.training for stage in module.backbone.stages()] == [True, False, False]
    before = digests(module, "backbone")
    fit(module, Several("image", ("target",)))
    moved = {name.split(".")[2] for name, digest in digests(module, "backbone").items() if digest != before[name]}
    assert moved == {"0"}


def test_nothing_of_the_kind_is_said():
    with pytest.raises(UserError, match="NormOnly finds no parameter to train in Tied"):
        Classification(Tied(), 3, finetuning=NormOnly())
    with pytest.raises(UserError, match="k: 0 must be at least 1"):
        FirstStages(0)
