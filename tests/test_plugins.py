"""A user's file outside the package: one of each kind, by short config, no edit of the package."""

import csv

import pytest

MINE = '''
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanAbsoluteError, MetricCollection

from datamodules import TransferDataModule
from tl_modules import Backbone, FineTuning, Head, Method, TransferModule


class Flat(Backbone):
    def __init__(self, width: int = 6):
        super().__init__()
        self.out_features = width
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(width), nn.Linear(width, width))
        self.layers(torch.zeros(1, 3, 28, 28))

    def forward(self, x):
        return self.layers(x.float().expand(-1, 3, -1, -1) / 255)

    def stages(self):
        return [self.layers[1], self.layers[2]]


class Doubled(Head):
    def __init__(self, in_features: int, out_features: int, times: int = 2):
        super().__init__()
        self.layer, self.times = nn.Linear(in_features, out_features), times

    def forward(self, x):
        return self.times * self.layer(x)


class OnlyLate(FineTuning):
    def trainable_stages(self, position, stages):
        return range(stages - 1 if position >= 1 else stages, stages)


class MeanMatch(Method):
    """The distance between the domains' mean features."""

    required_domains = ("source", "target")

    def forward(self, module, source, target):
        return (source.features.mean(0) - target.features.mean(0)).square().sum()


class Brightness(TransferModule):
    monitor = ("val/mae", "min")

    def loss(self, out):
        return (out.output.squeeze(1) - out.y).abs()

    def metrics(self):
        return MetricCollection({"mae": MeanAbsoluteError()})

    def postprocess(self, out):
        return out.output.squeeze(1)

    def prediction_columns(self, prediction):
        return {"brightness": prediction.tolist()}


class Grey(TransferDataModule):
    num_outputs = 1

    def domains(self, split):
        x = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)[::5]
        data = TensorDataset(x, x[:, 0, 0, 0].float() / 255)
        return {"target": data}
'''


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)


RUNS = {
    "backbone": "--model.backbone mine.Flat --model.backbone.width 5",
    "head": "--model.backbone.width 4 --model.head mine.Doubled --model.head.times 3",
    "strategy": "--model.backbone.width 4 --model.finetuning mine.OnlyLate --model.finetuning.lr_decay 0.5 --model.lr_scheduler null",
    "method": "--model.backbone.width 4 --model.methods+=mine.MeanMatch --data.source true",
    "task": "--model mine.Brightness --model.backbone ConvNet --model.backbone.width 4 --data mine.Grey",
    "datamodule": "--model Regression --model.backbone ConvNet --model.backbone.width 4 --data mine.Grey",
}


@pytest.mark.parametrize("kind", RUNS)
def test_one_of_each(kind, mine, ok, tl, tmp_path):
    printed = ok(f"fit --name x --trainer.max_epochs 2 {RUNS[kind]}")
    assert "tl test --run runs/x/version_0 --trust mine" in printed
    assert "pass --trust mine" in tl("test --run runs/x/version_0").err
    ok("test --run runs/x/version_0 --trust mine")
    rows = list(csv.DictReader((tmp_path / "runs/x/version_0/metrics.csv").open()))
    assert len(rows) == 2
    if kind == "method":
        assert float(rows[-1]["train/meanmatch"]) > 0
    if kind == "strategy":
        assert float(rows[-1]["lr/stage_2"]) == 1.5e-3
    if kind in ("task", "datamodule"):
        ok("predict --run runs/x/version_0 --out p.csv --trust mine")
        assert (tmp_path / "p.csv").read_text().startswith("id,brightness" if kind == "task" else "id,value")


def test_all_in_one_yaml(mine, ok, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "model:\n  class_path: mine.Brightness\n  init_args:\n    backbone: mine.Flat\n    head: mine.Doubled\n"
        "    finetuning: mine.OnlyLate\n    methods: [L2SP]\ndata: mine.Grey\n"
    )
    ok("fit -c mine.yaml --trainer.max_epochs 2")
    ok("test --run runs/grey/version_0 --trust mine")
