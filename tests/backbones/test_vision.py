"""Every backbone: features, stages, frozen strategies; a new class is tested by adding its case."""

import pytest
import torch
from torch import nn

import tl_modules
from tl_modules import (
    Classification,
    ConvNet,
    ImageBackbone,
    LeNet,
    TimmBackbone,
    TorchHubBackbone,
    TorchvisionBackbone,
)
from tl_modules.backbones.stages import strip_classifier
from tl_modules.errors import UserError

HUBCONF = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2)
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU())
        self.fc = nn.Linear(width, 5)
    def forward(self, x):
        return self.fc(self.block(self.stem(x)).mean((2, 3)))

class Headless(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3)
    def forward(self, x):
        return self.conv(x)

def tiny(width=6, pretrained=False):
    return Tiny(width)

def headless():
    return Headless()

def number():
    return 3
"""
SMALL = [
    ("resnet18", 512, 64, 5),
    ("squeezenet1_0", 512, 64, 4),
    ("squeezenet1_1", 512, 64, 4),
    ("mobilenet_v2", 1280, 64, 5),
    ("mobilenet_v3_small", 1024, 64, 5),
    ("efficientnet_b0", 1280, 64, 5),
    ("convnext_tiny", 768, 64, 4),
    ("vit_b_16", 768, 224, 13),
    ("vit_b_32", 768, 224, 13),
    ("swin_t", 768, 64, 4),
    ("swin_v2_t", 768, 64, 4),
    ("regnet_y_400mf", 440, 64, 5),
    ("densenet121", 1024, 64, 5),
    ("shufflenet_v2_x0_5", 1024, 64, 4),
    ("mnasnet0_5", 1280, 64, 5),
    ("vgg11", 4096, 224, 6),
    ("alexnet", 4096, 224, 4),
    ("googlenet", 1024, 64, 5),
]


@pytest.fixture
def repo(tmp_path):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "hubconf.py").write_text(HUBCONF)
    return str(tmp_path / "repo")


def check(backbone, features, size, stages=None):
    """What holds for every backbone."""
    assert backbone.out_features == features
    backbone.eval()
    with torch.no_grad():
        images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
        out = backbone(images)
        assert out.shape == (2, features)
        assert torch.allclose(out, backbone(images.float() / 255), atol=1e-4)
        assert backbone(images[:, :1]).shape == (2, features)
    held = [id(p) for stage in backbone.stages() for p in stage.parameters()]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in backbone.parameters()}
    if stages is not None:
        assert len(backbone.stages()) == stages
    inside = {id(m) for stage in backbone.stages() for m in stage.modules()}
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    assert all(id(m) in inside for m in backbone.modules() if isinstance(m, kinds))


@pytest.mark.parametrize(("name", "features", "size", "stages"), SMALL, ids=[case[0] for case in SMALL])
def test_torchvision(name, features, size, stages):
    check(TorchvisionBackbone(name), features, size, stages)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet152", "wide_resnet50_2", "efficientnet_v2_s", "maxvit_t", "vit_l_16", "swin_b"]
)
def test_torchvision_large(name):
    backbone = TorchvisionBackbone(name)
    check(backbone, backbone.out_features, 224)
    assert len(backbone.stages()) >= 4


def test_stages_are_in_order_and_end_at_the_head():
    backbone = TorchvisionBackbone("resnet18")
    names = {id(p): name for name, p in backbone.model.named_parameters()}
    first = [names[id(next(stage.parameters()))].split(".")[0] for stage in backbone.stages()]
    assert first == ["conv1", "layer1", "layer2", "layer3", "layer4"]


def test_convnet():
    check(ConvNet(4), 16, 28, 3)
    check(ConvNet(4), 16, 64, 3)


@pytest.mark.parametrize(
    ("name", "size"), [("resnet10t", 64), ("vit_tiny_patch16_224", 224), ("mobilenetv3_small_050", 64)]
)
def test_timm(name, size):
    pytest.importorskip("timm")
    backbone = TimmBackbone(name)
    check(backbone, backbone.out_features, size)
    assert len(backbone.stages()) >= 3


def test_timm_offline_gives_one_sentence(monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def offline(*args, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("LocalEntryNotFoundError")
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(tl_modules.UserError, match="resnet10t could not be downloaded"):
        TimmBackbone("resnet10t", weights="DEFAULT")


def test_timm_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(tl_modules.UserError, match=r"pip install 'lightning-transfer\[timm\]'"):
        TimmBackbone("resnet10t")


@pytest.mark.parametrize(
    ("arguments", "random"),
    [(None, False), ({"width": 9}, False), ({"pretrained": True}, False), ({"pretrained": False}, True)],
)
def test_hub_weights_count_as_pretrained_unless_told(arguments, random, repo):
    assert TorchHubBackbone(repo, "tiny", arguments).random == random


def test_hub_from_a_local_folder(repo):
    check(TorchHubBackbone(repo, "tiny"), 6, 32, 2)
    check(TorchHubBackbone(repo, "tiny", arguments={"width": 9}), 9, 32)
    check(TorchHubBackbone(repo, "headless", image_size=16), 7, 16)


@pytest.mark.parametrize(("entry", "match"), [("tinny", "has no entry tinny"), ("number", "returns a int")])
def test_hub_mistakes(repo, entry, match):
    with pytest.raises(tl_modules.UserError, match=match):
        TorchHubBackbone(repo, entry)


def test_hub_repository_mistakes(tmp_path):
    with pytest.raises(tl_modules.UserError, match="has no hubconf"):
        TorchHubBackbone(str(tmp_path), "x")
    with pytest.raises(tl_modules.UserError, match="neither a folder nor owner/name"):
        TorchHubBackbone("nothing", "x")


def test_normalisation_by_hand():
    class Same(ImageBackbone):
        def stages(self):
            return []

    backbone = Same(nn.Identity(), 3, (0.5, 0.5, 0.5), (0.25, 0.5, 1.0))
    images = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    assert torch.allclose(backbone(images), torch.tensor([[2.0, -1.0, -0.3]]))


def test_strip_classifier_leaves_what_has_none():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    assert strip_classifier(model) is None
    assert isinstance(model[1], nn.Linear)


def cases(repo):
    """One small instance of each backbone class that is exported."""
    yield ConvNet, {"width": 4}, 28
    yield LeNet, {"batch_norm": True}, 28
    yield TorchvisionBackbone, {"name": "squeezenet1_1"}, 64
    yield TimmBackbone, {"name": "resnet10t"}, 64
    yield TorchHubBackbone, {"repo": repo, "name": "tiny", "arguments": {"pretrained": False}}, 32


def strategies(cls=tl_modules.FineTuning):
    """Every strategy that the package exports."""
    return [s for s in vars(tl_modules).values() if isinstance(s, type) and issubclass(s, cls) and s is not cls]


def test_every_backbone_has_a_case(repo):
    exported = {c for c in vars(tl_modules).values() if isinstance(c, type) and issubclass(c, ImageBackbone)}
    assert exported - {ImageBackbone} == {case[0] for case in cases(repo)}


@pytest.mark.parametrize("strategy", strategies(), ids=lambda s: s.__name__)
@pytest.mark.parametrize("number", range(5))
def test_every_strategy_on_every_backbone(number, strategy, repo):
    cls, arguments, size = list(cases(repo))[number]
    if strategy is tl_modules.NormOnly and arguments.get("name") == "squeezenet1_1":
        with pytest.raises(tl_modules.UserError, match="NormOnly finds no parameter to train"):
            Classification(cls(**arguments), 3, finetuning=strategy())
        return
    module = Classification(cls(**arguments), 3, finetuning=strategy(lr_decay=0.5))
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    stages = module.backbone.stages()
    parameters = list(module.finetuning.parameters(stages))
    seen = set()
    for epoch in range(3):
        module.train()
        module.finetuning.apply(module, epoch)
        trainable = module.finetuning.trainable_stages(epoch, len(stages))
        assert seen <= set(trainable)  # what was unfrozen stays so
        seen = set(trainable)
        before = {k: v.clone() for k, v in module.state_dict().items()}
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module.forward_domains({"target": (images, torch.tensor([0, 1, 2, 0]))})["target"].mean_loss.backward()
        optimizer.step()
        names = {id(v): k for k, v in [*module.named_parameters(), *module.named_buffers()]}
        train = {id(p) for number, p, trains in parameters if number in trainable and trains}
        for index, stage in enumerate(stages):
            tensors = [*stage.parameters(), *stage.buffers()]
            changed = {id(t) for t in tensors if not torch.equal(before[names[id(t)]], t)}
            may = train | {id(b) for b in stage.buffers()} if index in trainable else set()
            assert changed <= may
            if all(trains for number, _, trains in parameters if number == index):  # a bias alone may have no gradient
                assert bool(changed) == (index in trainable)
            assert all(m.training == (index in trainable) for m in list(stage.modules())[1:])
    groups = list(module.finetuning.param_groups(module))
    held = [id(p) for group in groups for p in group["params"]]
    left_out = {id(p) for *_, p, trains in parameters if not trains}
    assert sorted(held) == sorted(id(p) for p in module.parameters() if id(p) not in left_out)
    for group in groups:
        from_the_head = 0 if group["name"] == "head" else len(stages) - int(group["name"].removeprefix("stage_"))
        assert group["lr_scale"] == 0.5**from_the_head


def test_images_of_unequal_sizes_are_said():
    ragged = ConvNet(4).prepare([torch.rand(3, 16, 16), torch.rand(3, 20, 16)])
    with pytest.raises(UserError, match="ConvNet takes images of one size"):
        ConvNet(4)(ragged)


def test_other_inputs_are_said():
    with pytest.raises(UserError, match=r"ConvNet takes images, but the data's inputs are numeric; use .* TabularMLP"):
        Classification(ConvNet(4), {"x": {"numeric": ["a"]}, "y": {"classes": ["b", "c"]}})


def test_torchvision_weights_say_what_images_they_were_measured_on(tmp_path):
    assert TorchvisionBackbone("squeezenet1_0").data_defaults == {}
    state = TorchvisionBackbone("efficientnet_b1").model.state_dict()
    torch.save(state, tmp_path / "w.pth")
    backbone = TorchvisionBackbone("efficientnet_b1", weights=tmp_path / "w.pth")
    assert backbone.data_defaults == {"image_size": 240, "resize_size": 256, "interpolation": "bicubic"}


def test_torchvision_weights_of_a_name_say_their_own(monkeypatch):
    from torchvision import models

    entry = models.EfficientNet_B1_Weights.IMAGENET1K_V2
    state = models.efficientnet_b1().state_dict()
    monkeypatch.setattr(type(entry), "get_state_dict", lambda self, **_: state)
    backbone = TorchvisionBackbone("efficientnet_b1", weights="IMAGENET1K_V2")
    assert backbone.data_defaults == {"image_size": 240, "resize_size": 255, "interpolation": "bilinear"}


def test_statistics_are_those_of_the_weights_unless_given(monkeypatch, tmp_path):
    from torchvision.transforms._presets import ImageClassification

    torch.save(TorchvisionBackbone("squeezenet1_0").model.state_dict(), tmp_path / "w.pth")
    own = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    made = ImageClassification.__init__
    monkeypatch.setattr(ImageClassification, "__init__", lambda self, **kw: made(self, **kw | own))
    backbone = TorchvisionBackbone("squeezenet1_0", weights=tmp_path / "w.pth")
    assert backbone.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert backbone.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    given = TorchvisionBackbone("squeezenet1_0", weights=tmp_path / "w.pth", mean=[0.5] * 3)
    assert given.mean.flatten().tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("resnet18.tv_in1k", (224, 256, "bilinear")), ("mobilenetv3_small_050.lamb_in1k", (224, 256, "bicubic"))],
)
def test_timm_says_what_images_its_weights_were_measured_on(name, wanted, tmp_path):
    pytest.importorskip("timm")
    assert TimmBackbone(name).data_defaults == {}
    torch.save(TimmBackbone(name).model.state_dict(), tmp_path / "w.pth")
    found = TimmBackbone(name, weights=tmp_path / "w.pth").data_defaults
    assert tuple(found.values()) == wanted


def test_a_network_of_a_fixed_size_says_it_without_weights_too():
    pytest.importorskip("timm")
    assert TimmBackbone("deit_tiny_patch16_224").data_defaults["image_size"] == 224
