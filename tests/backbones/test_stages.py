"""Stages of networks that share modules, and the layout in which a network is fast."""

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from tl_modules import TimmBackbone, TorchvisionBackbone
from tl_modules.backbones.stages import stages_by_name
from tl_modules.batch.compat import _sees_padding_only, cpu_has_bf16, tiny_inputs_in_float32


def test_what_stages_share_belongs_to_the_deepest():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.position = nn.Linear(2, 2), nn.Linear(2, 2)
            self.blocks = nn.ModuleList([nn.ModuleDict({"p": self.position, "own": nn.Linear(2, 2)}) for _ in range(2)])

    model = Shared()
    stages = stages_by_name(model, {"stem": 0, "position": 0, "blocks.0": 1, "blocks.1": 2})
    held = [{id(p) for p in stage.parameters()} for stage in stages]
    assert [len(part) for part in held] == [2, 2, 4]
    assert len(set().union(*held)) == len(list(model.parameters()))
    assert id(model.position.weight) in held[2]


def test_timm_network_that_shares_modules():
    pytest.importorskip("timm")
    backbone = TimmBackbone("coat_lite_tiny")
    held = [id(p) for stage in backbone.stages() for p in stage.parameters()]
    assert sorted(held) == sorted(id(p) for p in backbone.parameters())


CONVOLUTION = """
import torch
layer = torch.nn.Conv2d(3, 64, 1, 2, bias=False).to(memory_format=torch.channels_last)
images = torch.randn(16, 3, 128, 128).contiguous(memory_format=torch.channels_last)
layer(images).square().sum().backward()
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's kernels are those of x86")
def test_the_convolution_that_kills_a_process_still_does():
    """Once it does not, `suits_channels_last` of backbones/stages.py has no need to look for it."""
    code = subprocess.run([sys.executable, "-c", CONVOLUTION], capture_output=True, timeout=120).returncode
    assert code < 0, "oneDNN's issue 6035 is fixed in this torch: let stages.suits_channels_last go"


@pytest.mark.parametrize("name", ["mobileone_s0", "repvgg_a0"])
def test_networks_with_that_convolution_train(name):
    pytest.importorskip("timm")
    script = f"""
import torch
from tl_modules import TimmBackbone
backbone = TimmBackbone({name!r})
assert not backbone.normalize.channels_last
backbone(torch.randint(0, 256, (16, 3, 128, 128), dtype=torch.uint8)).square().sum().backward()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


def test_other_networks_are_channels_last():
    backbone = TorchvisionBackbone("resnet18")
    assert backbone.normalize.channels_last
    assert backbone.model.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def tiny_gradient(guarded):
    """The gradient of a strided convolution's weights, of which only the middle one sees the input, in bfloat16."""
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 128, 3, 2, 1, bias=False)
    if guarded:
        tiny_inputs_in_float32(layer)
    for _ in range(2):  # what is allocated next was not a number before
        dirt = [torch.full((1 << size,), float("nan")) for size in range(4, 22)]
        del dirt
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(torch.ones(8, 64, 1, 1))
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        layer.weight.grad = None
        output.float().sum().backward()
    return layer.weight.grad


def test_weights_that_see_only_padding_get_no_gradient():
    gradient = tiny_gradient(guarded=True)
    assert (gradient[:, :, 1, 1] == 8).all()
    gradient[:, :, 1, 1] = 0
    assert not gradient.any()


@pytest.mark.skipif(not cpu_has_bf16(), reason="only kernels for bfloat16 leave it uninitialised")
def test_without_help_they_still_do():
    """Once they do not, `tiny_inputs_in_float32` of batch/compat.py can go."""
    gradient = tiny_gradient(guarded=False)
    gradient[:, :, 1, 1] = 0
    assert not (gradient == 0).all(), "oneDNN writes these gradients in this torch: let tiny_inputs_in_float32 go"


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "size", "beyond"),
    [
        (3, 2, 1, 1, 1, True),
        (3, 2, 1, 1, 2, True),
        (3, 2, 1, 1, 3, False),
        (3, 3, 1, 1, 2, True),
        (7, 2, 3, 1, 1, True),
        (7, 2, 3, 1, 2, True),
        (7, 2, 3, 1, 32, False),
        (1, 2, 0, 1, 1, False),
        (3, 2, 2, 2, 2, True),
        (3, 2, "valid", 1, 5, False),
    ],
)
def test_which_weights_lie_beyond_the_input(kernel, stride, padding, dilation, size, beyond):
    layer = nn.Conv1d(1, 1, kernel, stride, padding, dilation, bias=False)
    layer(torch.ones(1, 1, size)).sum().backward()
    assert _sees_padding_only(layer, 0, size) == beyond == bool((layer.weight.grad == 0).any())
