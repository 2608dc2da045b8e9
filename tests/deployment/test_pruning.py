"""Pruned channels are really gone, the head is not, and the shapes of the tensors alone build the network again."""

import copy

import pytest
import torch
from torch import nn

from tl_modules import Classification, ConvNet, FeatureExtraction, TabularMLP, TorchvisionBackbone, UserError
from tl_modules.batch.samples import Batch
from tl_modules.checkpoints.compressed import fit_shapes
from tl_modules.evaluation.cost import macs

pytest.importorskip("torch_pruning")

from tl_modules.deployment.pruning import prune

SIDES = {"resnet18": 32, "squeezenet1_1": 64, "mobilenet_v3_small": 32, "shufflenet_v2_x0_5": 32}


def images(side=28, count=2, channels=3):
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def rebuilt(fresh, pruned):
    """A new network that has seen no more of the pruned one than its state dict."""
    fresh.on_load_checkpoint({"state_dict": pruned.state_dict(), "pruned": True})
    fresh.load_state_dict(pruned.state_dict())
    return fresh.eval()


@pytest.mark.parametrize("importance", ["magnitude", "lamp", "taylor"])
def test_half_of_the_macs_go_and_the_head_stays(importance):
    torch.manual_seed(0)
    module, x = Classification(ConvNet(16), 3).eval(), images()
    head, before = copy.deepcopy(module.head.state_dict()), macs(module, x)
    prune(module, x, 0.5, importance, [Batch(x, torch.tensor([0, 1]))])
    assert 0.35 * before < macs(module, x) <= 0.5 * before
    assert module.backbone.pruned
    assert all(torch.equal(module.head.state_dict()[key], value) for key, value in head.items())
    assert module.backbone.model[2][3].out_channels == module.backbone.out_features == 64
    assert sum(p.numel() for p in module.parameters()) < sum(
        p.numel() for p in Classification(ConvNet(16), 3).parameters()
    )
    assert all(p.grad is None for p in module.parameters())
    fresh = rebuilt(Classification(ConvNet(16), 3), module)
    assert torch.equal(fresh(x), module(x))
    assert macs(fresh, x) == macs(module, x)
    checkpoint = {"state_dict": fresh.state_dict()}
    fresh.on_save_checkpoint(checkpoint)  # so that a run that goes on from it says so too
    assert checkpoint["pruned"] is True


def test_what_goes_is_what_counts_least():
    torch.manual_seed(0)
    module = Classification(ConvNet(8), 3).eval()
    with torch.no_grad():
        module.backbone.model[1][0].weight[:8].mul_(100)
    x = images()
    prune(module, x, 0.3)
    left = module.backbone.model[1][0].weight.flatten(1).norm(dim=1)
    assert (left > 30).sum() == 8
    assert len(left) < 16


@pytest.mark.parametrize("name", SIDES)
def test_classifiers_of_torchvision(name):
    module, x = Classification(TorchvisionBackbone(name), 3).eval(), images(SIDES[name])
    if name.startswith("shufflenet"):  # its code splits channels in halves
        with pytest.raises(UserError, match="quantize it instead"):
            prune(module, x, 0.5)
        return
    before = macs(module, x)
    prune(module, x, 0.5)
    assert macs(module, x) <= 0.5 * before
    assert module.head[1].in_features == module.backbone.out_features
    fresh = rebuilt(Classification(TorchvisionBackbone(name), 3), module)
    torch.testing.assert_close(fresh(x), module(x))


def test_timm():
    pytest.importorskip("timm")
    from tl_modules import TimmBackbone

    module, x = Classification(TimmBackbone("test_resnet"), 3).eval(), images(32)
    prune(module, x, 0.3)
    fresh = rebuilt(Classification(TimmBackbone("test_resnet"), 3), module)
    torch.testing.assert_close(fresh(x), module(x))


def test_attention_keeps_its_width():
    pytest.importorskip("timm")
    from tl_modules import TimmBackbone

    module, x = Classification(TimmBackbone("test_vit"), 3).eval(), images(160)
    block = module.backbone.model.blocks[0]
    qkv, hidden = block.attn.qkv.weight.shape, block.mlp.fc1.out_features
    prune(module, x, 0.2)
    assert block.attn.qkv.weight.shape == qkv
    assert block.mlp.fc1.out_features < hidden
    torch.testing.assert_close(rebuilt(Classification(TimmBackbone("test_vit"), 3), module)(x), module(x))


def test_rows_and_any_head():
    torch.manual_seed(0)
    for head in (nn.Linear, lambda i, o: nn.Sequential(nn.Linear(i, 6), nn.ReLU(), nn.Linear(6, o))):
        module = Classification(TabularMLP(5, [32, 16]), 3, head=head).eval()
        x = torch.randn(4, 5)
        shapes = {key: value.shape for key, value in module.head.state_dict().items()}
        prune(module, x, 0.4)
        assert {key: value.shape for key, value in module.head.state_dict().items()} == shapes
        assert torch.equal(rebuilt(Classification(TabularMLP(5, [32, 16]), 3, head=head), module)(x), module(x))


def test_a_frozen_backbone_is_pruned_too():
    module = Classification(ConvNet(8), 3, finetuning=FeatureExtraction())
    module.open_stages()
    x, before = images(), macs(module.eval(), images())
    prune(module, x, 0.5)
    assert macs(module, x) <= 0.5 * before


@pytest.mark.parametrize("share", [0, 1, -0.5])
def test_a_share_of_nothing(share):
    with pytest.raises(UserError, match=r"must be above 0 and below 1"):
        prune(Classification(ConvNet(4), 3).eval(), images(), share)


def test_more_than_can_go():
    with pytest.raises(UserError, match=r"ConvNet can lose 0\.\d\d .*; pass less than 0\.999"):
        prune(Classification(ConvNet(4), 3).eval(), images(), 0.999)


class Halves(ConvNet):
    """Its code hard-codes a number of channels."""

    def forward(self, x):
        return super().forward(x)[:, :16] * self.model[0][0].weight.new_ones(16)

    def preprocess(self, images):
        assert self.model[0][0].out_channels == self.width_of_first, "a width of its own"
        return super().preprocess(images)

    width_of_first = 4


def test_code_with_widths_of_its_own_is_refused():
    with pytest.raises(UserError, match="quantize it instead"):
        prune(Classification(Halves(4), 3).eval(), images(), 0.5)


def test_layers_take_the_shapes_of_a_state():
    def network(i, o):
        norm = nn.GroupNorm(2, o)
        depthwise = nn.Conv2d(o, o, 3, groups=o)
        return nn.Sequential(nn.Conv2d(i, o, 1), norm, depthwise, nn.BatchNorm2d(o), nn.ConvTranspose2d(o, i, 2),
                             nn.Flatten(), nn.LayerNorm(9 * i), nn.Linear(9 * i, o))  # fmt: skip

    small, large = network(2, 4).eval(), network(3, 8).eval()
    parameters = list(large.parameters())
    fit_shapes(large, small.state_dict())
    large.load_state_dict(small.state_dict())
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(large(x), small(x))
    assert all(one is other for one, other in zip(parameters, large.parameters(), strict=True))
    assert repr(large) == repr(small)


def test_whole_blocks_of_channels_are_left_in_wide_layers():
    module = Classification(ConvNet(32), 3).eval()
    prune(module, images(), 0.5)
    widths = [len(part.weight) for part in module.backbone.modules() if isinstance(part, nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths)
    assert widths[:-1] != [32, 64]
