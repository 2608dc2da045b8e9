"""A backbone cut after any stage gives the same outputs and gradients as the whole."""

import pytest
import torch
from torch import nn

from tl_modules import (
    Backbone,
    ConvNet,
    FTTransformer,
    LastStages,
    LeNet,
    TabularMLP,
    TabularResNet,
    TimmBackbone,
    TorchvisionBackbone,
    UserError,
)
from tl_modules.batch import samples
from tl_modules.cache.cut import CannotCut, Cut
from tl_modules.cache.frozen import divide
from tl_modules.cache.leaves import difference


def bound(backbone):
    """Built for three numbers and two columns of categories."""
    backbone.bind_schema({"numeric": ["a", "b", "c"], "categorical": {"d": ["x", "y"], "e": ["z"]}})
    return backbone


BACKBONES = {
    "ConvNet": lambda: ConvNet(4),
    "LeNet": lambda: LeNet(dropout=0.5),
    "TabularMLP": lambda: TabularMLP(3, [8, 6, 4], dropout=0.5),
    "MixedMLP": lambda: bound(TabularMLP(widths=[8, 6, 4])),
    "TabularResNet": lambda: bound(TabularResNet(3, 8)),
    "FTTransformer": lambda: bound(FTTransformer(2, 8)),
    "resnet18": lambda: TorchvisionBackbone("resnet18"),
    "squeezenet1_1": lambda: TorchvisionBackbone("squeezenet1_1"),
    "mobilenet_v3_small": lambda: TorchvisionBackbone("mobilenet_v3_small"),
    "vit_tiny": lambda: TimmBackbone("test_vit"),
    "tinynet_e": lambda: TimmBackbone("tinynet_e"),
    "convnext": lambda: TimmBackbone("test_convnext"),
}
SIDES = {"LeNet": 28, "vit_tiny": 160}


def freeze(backbone, closed):
    """What `FineTuning.apply` does."""
    backbone.train(closed == 0)
    for number, stage in enumerate(backbone.stages()):
        stage.train(number >= closed).requires_grad_(number >= closed)


def inputs(name, count=3):
    if name in ("MixedMLP", "TabularResNet", "FTTransformer"):
        codes = torch.stack([torch.arange(count) % 3, torch.arange(count) % 2], 1)
        return {"numeric": torch.randn(count, 3), "categorical": codes}
    side = SIDES.get(name, 32)
    return torch.randn(count, 3) if name == "TabularMLP" else torch.randint(0, 256, (count, 3, side, side)).byte()


@pytest.mark.parametrize("name", BACKBONES)
def test_both_parts_are_the_whole(name):
    torch.manual_seed(0)
    backbone = BACKBONES[name]()
    stages = backbone.stages()
    for closed in range(1, len(stages) + 1):
        freeze(backbone, closed)
        state = {key: value.clone() for key, value in backbone.state_dict().items()}
        cut, x = Cut(backbone, closed, inputs(name)), inputs(name)
        backbone.eval()
        with torch.no_grad():
            tree = cut.record(x)
        freeze(backbone, closed)
        assert samples.count(tree) == 3
        assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())
        results = []
        for way in (lambda x: backbone(x), lambda x, c=cut, t=tree: c.replay(t)):
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
    """A stage, a second one, combined by a test in `forward`."""

    out_features = 4

    def __init__(self):
        super().__init__()
        self.one, self.two, self.between = nn.Linear(4, 4), nn.Linear(4, 4), nn.Identity()

    def stages(self):
        return [self.one, self.two]


def exact(net, x, other=None, closed=1):
    """Returns what is kept of a sample, after checking that replay gives the same as the whole."""
    freeze(net, closed)
    cut = Cut(net, closed, x)
    net.eval()
    other = x if other is None else other
    with torch.no_grad():
        tree = cut.record(other)
        assert difference(cut.replay(tree), net(other)) < 1e-5
    return tree


def test_skip_connections_pass():
    class Skips(Net):
        def forward(self, x):
            first = self.one(x)
            return self.two(first.relu()) + first

    net = Skips()
    assert torch.equal(exact(net, torch.randn(3, 4), x := torch.randn(3, 4))[0], net.one(x))


def test_what_belongs_to_no_stage_counts_as_trainable():
    class Between(Net):
        def forward(self, x):
            return self.two(self.between(self.one(x)))

    net = Between()
    net.between = nn.Dropout(0.5)
    (kept,) = exact(net, torch.ones(2, 4))
    assert torch.equal(kept, net.one(torch.ones(2, 4)))
    assert divide(net, 1) == ([net.one], [net.two, net.between], [])


def test_a_shared_parameter_counts_as_trainable():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.zero = nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def stages(self):
            return [self.zero, self.one, self.two]

        def forward(self, x):
            return self.two(self.one(self.zero(x)))

    net = Tied()
    assert divide(net, 2).frozen == [net.zero]
    assert torch.equal(exact(net, torch.ones(2, 4), closed=2)[0], net.zero(torch.ones(2, 4)))


def test_a_loose_parameter_counts_as_trainable():
    class Token(Net):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return self.two(self.one(x + self.token))

    with pytest.raises(CannotCut, match="trainable stages read only the input itself"):
        Cut(Token(), 1, torch.randn(3, 4))


def test_a_frozen_module_behind_a_trainable_one_runs():
    class Twice(Net):
        def forward(self, x):
            return self.one(self.two(self.one(x)).argmax(1, keepdim=True) + x)

    net = Twice()
    kept = exact(net, torch.randn(3, 4), x := torch.randn(3, 4))
    assert len(kept) == 2
    assert torch.equal(kept[0], x)


@pytest.mark.parametrize("way", ["tuple", "list", "dict", "nested"])
def test_modules_return_anything(way):
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            h = self.inner(x)
            return {"tuple": (h, None, h + 1), "list": [h, 3, h + 1], "dict": {"a": h, "b": h + 1},
                    "nested": ({"a": h, "n": 7}, [h + 1, (None,)])}[way]  # fmt: skip

    class Returns(Net):
        def __init__(self):
            super().__init__()
            self.one = Many()

        def forward(self, x):
            given = self.one(x)
            a, b = {"tuple": lambda: given[::2], "list": lambda: given[::2], "dict": given.values if way == "dict" else None,
                    "nested": lambda: (given[0]["a"], given[1][0])}[way]()  # fmt: skip
            return {"last": self.two(a), "both": (a * b,)}

    assert len(exact(Returns(), torch.randn(3, 4), torch.randn(5, 4))) == 2


def test_what_is_written_into_is_not_spoilt():
    class Writes(Net):
        def forward(self, x):
            return self.two(self.one(x).add_(1))

    net = Writes().eval()
    x = torch.randn(3, 4)
    cut = Cut(net, 1, x)
    tree = cut.record(x)
    first = cut.replay(tree)
    assert torch.equal(cut.replay(tree), first)
    assert torch.equal(first, net(x))


def test_shapes_are_known_where_they_are_asked_for():
    class Size(Net):
        def forward(self, x):
            rows = x.shape[0]
            return self.two(self.one(x)).reshape(rows, -1) - x.shape[1]

    assert len(exact(Size(), torch.randn(4, 4), torch.randn(7, 4))) == 1


def test_what_the_others_do_in_a_container_runs_with_the_batch():
    class Average(Net):
        def forward(self, x):
            return self.two(self.one(x) - self.one(x).mean(0))

    exact(Average(), torch.randn(4, 4), torch.randn(6, 4))


def test_whole_numbers_that_happen_to_be_zero_are_kept():
    class Types(Net):
        def forward(self, x):
            return self.two(self.one(x["values"])) + x["type"][:, None]

    plan = {"values": torch.randn(3, 4), "type": torch.zeros(3, dtype=torch.long)}
    tree = exact(Types(), plan, {"values": torch.randn(3, 4), "type": torch.arange(3)})
    assert tree[0].tolist() == [0, 1, 2]


class Average(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(0))  # a sample's entry depends on the others


class Whole(nn.Linear):
    def forward(self, x):
        return super().forward(x), super().forward(x).mean(0, keepdim=True)


class Thing(nn.Linear):
    thing = object()

    def forward(self, x):
        return self.thing


@pytest.mark.parametrize(
    ("one", "forward", "reason"),
    [
        (nn.Linear, lambda net, x: net.two(x), "read only the input itself"),
        (
            nn.Linear,
            lambda net, x: net.one(x) if net.two(x).isfinite().all() else net.two(x),
            "depends on outputs of trainable ones",
        ),
        (Average, lambda net, x: net.two(net.one(x)), "differ alone and in a batch"),
        (Whole, lambda net, x: net.two(net.one(x)[1]).expand(len(x), 4), "read only the input itself"),
        (
            Thing,
            lambda net, x: net.two(x) + (net.one(x) is None),
            "returns a value that cannot be stored, of type object",
        ),
    ],
)
def test_what_cannot_be_cut_says_why(one, forward, reason):
    class Odd(Net):
        def __init__(self):
            super().__init__()
            self.one = one(4, 4)

        def forward(self, x):
            return forward(self, x)

    torch.manual_seed(0)
    with pytest.raises(CannotCut, match=reason):
        Cut(Odd(), 1, torch.randn(4, 4).abs())


def test_another_call_than_planned_is_refused():
    class Changes(Net):
        twice = False

        def forward(self, x):
            h = self.one(x)
            return self.two(self.one(h) if self.twice else h)

    net = Changes().eval()
    cut = Cut(net, 1, torch.randn(3, 4))
    tree = cut.record(torch.randn(3, 4))
    net.twice = True
    with pytest.raises(UserError, match="does not call its frozen Linear as it did when it was cached"):
        cut.replay(tree)


@pytest.mark.parametrize("seed", range(5))
def test_layers_that_are_left_out_at_random_change_no_cut(seed):
    """A forward that draws in training does not, while anything in it is frozen; and planning draws nothing."""

    class LayerDrop(Net):
        def forward(self, x):
            drawn = torch.rand(())  # as in transformers, whether in training or not
            x = self.one(x)
            return x if self.training and drawn < 0.5 else self.two(x)

    net = LayerDrop()
    net.train()
    torch.manual_seed(seed)
    x = torch.randn(4, 4)
    before = torch.get_rng_state()
    cut = Cut(net, 1, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert net.training
    net.eval()
    assert torch.equal(cut.replay(cut.record(x)), net.two(net.one(x)))


def test_frozen_layers_never_drop_and_open_ones_do():
    class Dropped(nn.Linear):
        def forward(self, x):
            return x if self.training and torch.rand(()) < 0.5 else super().forward(x)

    class Layers(Net):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Dropped(4, 4) for _ in range(4))

        def stages(self):
            return list(self.layers)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    net, x = Layers(), torch.randn(2, 4)
    freeze(net, 2)
    cut = Cut(net, 2, x)
    (tree,) = cut.record(x)
    assert torch.equal(tree, net.layers[1].eval()(net.layers[0].eval()(x)))
    found = {tuple(cut.replay((tree,)).flatten().tolist()) for _ in range(40)}
    assert len(found) == 4  # each of the two open layers is there or not


def test_a_compiled_backbone_has_compiled_trainable_modules():
    backbone, x = ConvNet(4), torch.randn(2, 3, 8, 8)
    Cut(backbone, 1, x)
    assert all(module._compiled_call_impl is None for module in backbone.model)
    backbone.compile(backend="eager")
    cut = Cut(backbone.eval(), 1, x)
    assert [module._compiled_call_impl is not None for module in backbone.model] == [False, True, True]
    assert cut.division.trainable == [backbone.model[1], backbone.model[2]]


def test_strategies_and_cuts_agree_on_what_is_frozen():
    backbone = ConvNet(4)
    division = divide(backbone, LastStages(1).trainable_stages(0, 3).start)
    assert division.frozen == [backbone.normalize, backbone.model[0], backbone.model[1]]
    assert division.trainable == [backbone.model[2]]
