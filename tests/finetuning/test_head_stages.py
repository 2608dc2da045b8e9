"""A pretrained head, e.g. a decoder, has stages too: strategies count through both."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn

from datamodules import Digits
from tl_modules import Classification, ConvNet, FeatureExtraction, FullFineTuning, Head, LastStages
from tl_modules.cache import FeatureCache
from tl_modules.finetuning.audit import FreezeAudit
from tl_modules.runs import ExactResume


class Decoder(Head):
    """Two layers that count as pretrained, and a new one."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(in_features, in_features), nn.Dropout(0.5)) for _ in "ab")
        self.new = nn.Linear(in_features, out_features)

    def forward(self, features):
        for layer in self.layers:
            features = layer(features).relu()
        return self.new(features)

    def stages(self):
        return list(self.layers)


def fitted(strategy, **cache):
    seed_everything(0, verbose=False)
    module = Classification(ConvNet(4), 10, head=Decoder, finetuning=strategy)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    trainer = Trainer(
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[FreezeAudit(), ExactResume(), FeatureCache(**cache)],
    )
    trainer.fit(module, Digits(shots_per_class=4))
    changed = {k.rpartition(".")[0] for k, v in module.state_dict().items() if not torch.equal(v, before[k])}
    return module, {name for name in changed if "backbone" not in name}, any("backbone" in name for name in changed)


@pytest.mark.parametrize(("strategy", "head", "backbone"), [
    (FeatureExtraction(), {"head.new"}, False),
    (LastStages(1), {"head.layers.1.0", "head.new"}, False),
    (LastStages(2), {"head.layers.0.0", "head.layers.1.0", "head.new"}, False),
    (LastStages(3), {"head.layers.0.0", "head.layers.1.0", "head.new"}, True),
    (FullFineTuning(), {"head.layers.0.0", "head.layers.1.0", "head.new"}, True),
])  # fmt: skip
def test_what_trains(strategy, head, backbone):
    module, changed, moved = fitted(strategy)
    assert changed == head
    assert moved == backbone
    module.train()
    trainable = module.trainable_stages(0)
    assert [layer[1].training for layer in module.head.layers] == [number in trainable for number in (3, 4)]
    assert module.head.new.training


def test_groups_are_named_by_stage():
    module = Classification(ConvNet(4), 10, head=Decoder, finetuning=FullFineTuning(lr_decay=0.5))
    groups = {group["name"]: group for group in module.finetuning.param_groups(module)}
    assert set(groups) == {"head", *(f"stage_{number}" for number in range(5))}
    assert {id(p) for p in groups["head"]["params"]} == {id(p) for p in module.head.new.parameters()}
    assert groups["stage_4"]["lr_scale"] == 2 * groups["stage_3"]["lr_scale"]


@pytest.mark.parametrize("strategy", [FeatureExtraction, lambda: LastStages(1)])
def test_a_frozen_backbone_is_cached_below_a_staged_head(strategy):
    one, other = (fitted(strategy(), enabled=enabled)[0].state_dict() for enabled in (False, True))
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5)
