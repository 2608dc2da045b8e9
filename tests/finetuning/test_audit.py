"""Each planted fault stops the run; correct runs continue."""

import pytest
import torch

from tl_modules import Classification, ConvNet, LastStages
from tl_modules.finetuning.audit import checksums

RUN = "fit {options} --trainer.max_epochs 2 --model.backbone.width 4 --data.shots_per_class 4 --data.batch_size 16 "
FAULTS = """
import torch
from lightning.pytorch import Callback
from tl_modules import Classification, ConvNet, FineTuning


class Forgets(Classification):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p is not self.head[1].bias], 0.1)


class Twice(Classification):
    def configure_optimizers(self):
        return torch.optim.SGD([*self.parameters(), self.head[1].bias], 0.1)


class Unused(ConvNet):
    def __init__(self, width: int = 4):
        super().__init__(width)
        self.model[2].extra = torch.nn.Parameter(torch.zeros(3))


class Touches(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 3:
            pl_module.backbone.model[0][0].weight.data[0, 0, 0, 0] += 1e-6


class Thaws(Callback):
    def on_train_batch_start(self, trainer, pl_module, *args):
        pl_module.backbone.train()


class OnlyFirstBatch(Classification):
    def training_step(self, batch, batch_idx):
        ((x, y, _),) = batch.values()
        if batch_idx == 0:
            return super().training_step(batch, batch_idx)
        return torch.nn.functional.cross_entropy(self.head(self.backbone(x).detach()), y)
"""
CASES = {
    "in no optimizer": ("--model faults.Forgets --model.backbone ConvNet", "head.1.bias trains but is in no optimizer"),
    "twice": ("--model faults.Twice --model.backbone ConvNet", "head.1.bias is in the optimizer 2 times"),
    "a frozen weight changes": ("--model.finetuning LastStages --trainer.callbacks+=faults.Touches", "stage_0 is frozen, but one of its weights or buffers changed in epoch 0"),
    "a frozen BatchNorm changes": ("--model.finetuning FeatureExtraction --cache.enabled false --trainer.callbacks+=faults.Thaws", "stage_0 is frozen, but one of its weights or buffers changed in epoch 0"),
    "no gradient": ("--model.backbone faults.Unused", "backbone.model.2.extra was trainable for all of epoch 0 but never got a gradient"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def faults(module_file):
    module_file("faults", FAULTS)


@pytest.mark.parametrize("case", CASES)
def test_a_planted_fault_stops_the_run(case, tl):
    options, expected = CASES[case]
    result = tl(RUN, options=options)
    assert result.code == 2, result.out
    assert "freeze audit" in result.err
    assert expected in result.err
    assert tl(RUN + "--audit false", options=options).code == 0


@pytest.mark.parametrize("options", [
    "--model faults.OnlyFirstBatch --model.backbone ConvNet",  # some gradient is enough
    "--model.finetuning GradualUnfreezing --model.finetuning.every 2 --model.finetuning.unit steps",
    "--model.finetuning FreezeThenUnfreeze --trainer.accumulate_grad_batches 2",
    "--trainer.max_steps 1 --model.backbone faults.Unused",  # the epoch has not been whole
])  # fmt: skip
def test_what_is_right_goes_on(options, ok):
    ok(RUN, options=options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_a_checksum_sees_every_bit(dtype):
    module = Classification(ConvNet(4), 10, finetuning=LastStages(1))
    module.trainable = range(2, 3)
    buffer = torch.zeros(3, dtype=dtype)
    module.backbone.model[0].register_buffer("extra", buffer)
    before = checksums(module)
    assert set(before) == {"stage_0", "stage_1", "a part in no stage"}
    buffer[1] = 2**-14 if dtype == torch.float16 else 1e-30
    assert checksums(module)["stage_0"] != before["stage_0"]
    assert checksums(module)["stage_1"] == before["stage_1"]
