"""What a network costs, against numbers by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tl_modules import Classification, FeatureExtraction, LastStages, TorchvisionBackbone
from tl_modules.cache.cut import Cut
from tl_modules.evaluation import macs, peak_memory, speed

CPU = torch.device("cpu")


def test_macs_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    assert macs(net, torch.zeros(4, 3, 6, 6)) == 3 * 8 * 9 * 36 + 8 * 36 * 5


def test_peak_memory_by_hand():
    def work():
        a = torch.zeros(1000)
        b = a + 1  # both are held
        del a
        c = b.view(10, 100)  # no memory of its own
        return c * 2  # b and the result

    assert peak_memory(work, CPU) == 8000


def test_speed_is_ordered_and_counts_samples():
    class Slow(nn.Module):
        sizes = []

        def forward(self, x):
            self.sizes.append(len(x))
            return x

    found = speed(Slow(), torch.zeros(2, 3), 5, seconds=0.01)
    assert set(Slow.sizes) == {5}
    assert len(Slow.sizes) >= 8
    assert 0 < found["p50"] <= found["p95"] <= found["p99"]
    assert found["throughput"] > 0


@pytest.mark.parametrize("strategy", [FeatureExtraction(), LastStages(1), LastStages(2)])
def test_closed_stages_keep_nothing_for_a_backward_pass(strategy):
    """At most 10 % more than the no-grad forward of the frozen part and what the trainable part needs."""
    module = Classification(TorchvisionBackbone("resnet18"), 10, finetuning=strategy).train()
    x, y = torch.randint(0, 256, (4, 3, 96, 96), dtype=torch.uint8), torch.arange(4)
    cut = Cut(module.backbone, strategy.trainable_stages(0, 5).start, x)
    with torch.no_grad():
        tree = cut.record(x)

    def step():
        module.training_step({"target": (x, y)}, 0).backward()

    def frozen():
        with torch.no_grad():
            cut.record(x)

    def trainable():
        F.cross_entropy(module.head(cut.replay(tree)), y).backward()

    used = []
    for work in (step, frozen, trainable):
        module.zero_grad(set_to_none=True)
        used.append(peak_memory(work, CPU))
    assert used[0] <= 1.1 * (used[1] + used[2])
    module.backbone.requires_grad_(True)
    module.zero_grad(set_to_none=True)
    assert peak_memory(lambda: F.cross_entropy(module(x), y).backward(), CPU) > 1.2 * used[0]
