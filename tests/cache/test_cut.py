"""A backbone cut at any stage gives what the whole gives, and the same gradients."""

import pytest
import torch
from torch import nn

from tl_modules import Backbone, ConvNet, LastStages, TimmBackbone, TorchvisionBackbone
from tl_modules.cache.cut import NotCut, check, cut, run_trunk

BACKBONES = {
    "ConvNet": lambda: ConvNet(4),
    "resnet18": lambda: TorchvisionBackbone("resnet18"),
    "squeezenet1_1": lambda: TorchvisionBackbone("squeezenet1_1"),
    "mobilenet_v3_small": lambda: TorchvisionBackbone("mobilenet_v3_small"),
    "vit_tiny": lambda: TimmBackbone("vit_tiny_patch16_224"),
    "densenet (timm)": lambda: TimmBackbone("tinynet_e"),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_both_parts_are_the_whole(name):
    torch.manual_seed(0)
    backbone = BACKBONES[name]()
    x = torch.randint(0, 256, (3, 3, 224 if "vit" in name else 64, 224 if "vit" in name else 64), dtype=torch.uint8)
    stages = backbone.stages()
    for closed in range(1, len(stages) + 1) if len(stages) < 9 else (1, 6, len(stages)):
        backbone.train().requires_grad_(True)
        for stage in stages[:closed]:
            stage.eval().requires_grad_(False)
        both = cut(backbone, closed)
        with torch.no_grad():
            boundary = run_trunk(both, x)
        assert all(len(part) == 3 for part in boundary)
        results = []
        for way in (lambda x: backbone(x), lambda x, b=boundary, t=both.tail: t(*b)):
            torch.manual_seed(1)  # dropout and stochastic depth
            features = way(x)
            backbone.zero_grad()
            if closed < len(stages):
                features.square().sum().backward()
            results.append([features.detach(), *(p.grad.clone() for p in backbone.parameters() if p.grad is not None)])
        assert len(results[0]) == len(results[1])
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4 * max(1.0, float(one.abs().max())))


class Net(Backbone):
    """A stage, a second one, and what a test makes of them in `forward`."""

    out_features = 4

    def __init__(self):
        super().__init__()
        self.one, self.two, self.between = nn.Linear(4, 4), nn.Linear(4, 4), nn.Identity()

    def stages(self):
        return [self.one, self.two]


def test_skip_connections_pass_the_boundary():
    class Skips(Net):
        def forward(self, x):
            first = self.one(x)
            return self.two(first.relu()) + first

    net = Skips().eval()
    both = cut(net, 1)
    x = torch.randn(3, 4)
    boundary = run_trunk(both, x)
    assert len(boundary) == 2
    check(both, net, x, boundary)


def test_what_belongs_to_no_stage_counts_as_open():
    class Between(Net):
        def forward(self, x):
            return self.two(self.between(self.one(x)))

    net = Between()
    net.between = nn.Dropout(0.5)
    (boundary,) = run_trunk(cut(net, 1), torch.ones(2, 4))
    assert torch.equal(boundary, net.one(torch.ones(2, 4)))


def test_what_cannot_be_cut_says_why():
    class Depends(Net):
        def forward(self, x):
            return self.two(self.one(x)) if x.sum() > 0 else x

    class Around(Net):
        def forward(self, x):
            return self.two(self.one(x)) + x

    for kind, reason in ((Depends, "torch.fx cannot record"), (Around, "read the input")):
        with pytest.raises(NotCut, match=reason):
            cut(kind(), 1)


@pytest.mark.parametrize("seed", range(20))
def test_layers_that_are_left_out_at_random_change_no_cut(seed):
    """A forward that draws in training does not, while anything in it is closed; and recording it draws nothing."""

    class LayerDrop(Net):
        def forward(self, x):
            drawn = torch.rand(())  # as in transformers, whether in training or not
            x = self.one(x)
            return x if self.training and drawn < 0.5 else self.two(x)

    net = LayerDrop()
    net.train()
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    both = cut(net, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert net.training
    x = torch.randn(4, 4)
    net.eval()
    assert torch.allclose(both.tail(*run_trunk(both, x)), net.two(net.one(x)))


def test_what_the_cut_gets_wrong_is_noticed():
    class Size(Net):
        def forward(self, x):
            rows = x.shape[0]
            return self.two(self.one(x)).reshape(rows, -1)

    class Average(Net):
        def forward(self, x):
            return self.two(self.one(x) - self.one(x).mean(0))  # a sample's row depends on the others

    x = torch.randn(4, 4)
    for kind, reason in ((Size, "a row per sample"), (Average, "what the whole does")):
        net = kind().eval()
        both = cut(net, 1)
        boundary = run_trunk(both, x)
        with pytest.raises(NotCut, match=reason):
            check(both, net, x, boundary)


def test_strategies_and_cuts_agree_on_what_is_closed():
    strategy = LastStages(1)
    backbone = ConvNet(4)
    both = cut(backbone, strategy.trainable_stages(0, 3).start)
    closed = {id(p) for stage in backbone.stages()[:2] for p in stage.parameters()}
    assert {id(p) for p in both.trunk.parameters()} == closed
