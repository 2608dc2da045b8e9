"""Networks that are built for one size of images: built for another size, and messages for what does not fit."""

import pytest
import torch

from tl_modules import TimmBackbone, TorchvisionBackbone
from tl_modules.errors import UserError


@pytest.mark.parametrize(
    ("cls", "name", "position"),
    [
        (TorchvisionBackbone, "vit_b_32", "encoder.pos_embedding"),
        (TimmBackbone, "vit_tiny_patch16_224", "pos_embed"),
        (TimmBackbone, "swin_tiny_patch4_window7_224", "layers.3.blocks.0.attn.relative_position_bias_table"),
    ],
)
def test_a_network_of_one_size_is_built_for_another(cls, name, position, tmp_path, caplog):
    if cls is TimmBackbone:
        pytest.importorskip("timm")
    state = cls(name).model.state_dict()
    torch.save(state, tmp_path / "w.pth")
    caplog.set_level("INFO", "tl_modules")
    backbone = cls(name, weights=tmp_path / "w.pth", image_size=128).eval()
    assert backbone.data_defaults["image_size"] == 128
    assert 128 <= backbone.data_defaults["resize_size"] <= 150
    assert backbone(torch.zeros(1, 3, 128, 128)).shape == (1, backbone.out_features)
    with pytest.raises(
        UserError, match=r"the data's have 96 x 96; pass --data.image_size 128, or, if .*backbone.image_size 96"
    ):
        backbone(torch.zeros(1, 3, 96, 96))
    own = backbone.model.state_dict()
    same = [key for key in own if key in state and own[key].shape == state[key].shape]
    assert all(
        torch.equal(own[key], state[key]) for key in same if "relative_position" not in key and "mask" not in key
    )
    assert own[position].shape != state[position].shape
    assert position in caplog.text
    assert "interpolated to another image size" in caplog.text
    assert own[position].mean() == pytest.approx(float(state[position].mean()), abs=0.05)


@pytest.mark.parametrize(("cls", "name"), [(TorchvisionBackbone, "vit_b_32"), (TorchvisionBackbone, "maxvit_t"), (TimmBackbone, "vit_tiny_patch16_224")])  # fmt: skip
def test_a_size_that_a_network_cannot_have_is_said(cls, name):
    if cls is TimmBackbone:
        pytest.importorskip("timm")
    with pytest.raises(UserError, match=rf"image_size: {name} cannot be built for 5 pixels"):
        cls(name, image_size=5)


@pytest.mark.parametrize(
    ("cls", "name", "side"),
    [
        (TorchvisionBackbone, "alexnet", 32),
        (TorchvisionBackbone, "inception_v3", 32),
        (TorchvisionBackbone, "densenet121", 16),
        (TimmBackbone, "hrnet_w18_small", 16),
    ],
)
def test_images_that_are_too_small_for_a_network_are_said(cls, name, side):
    if cls is TimmBackbone:
        pytest.importorskip("timm")
    backbone = cls(name).eval()
    with pytest.raises(
        UserError,
        match=rf"image_size: {name} cannot take images of {side} x {side} pixels .*; pass a larger --data.ima",
    ):
        backbone(torch.zeros(2, 3, side, side))
    backbone.model = torch.nn.Conv2d(4, 4, 1)  # anything else keeps its traceback
    with pytest.raises(RuntimeError, match="to have 4 channels"):
        backbone(torch.zeros(2, 3, side, side))


def test_image_size_of_a_network_that_takes_any_is_the_data_s():
    assert TorchvisionBackbone("squeezenet1_0", image_size=96).data_defaults["image_size"] == 96
    assert TorchvisionBackbone("squeezenet1_0", image_size=96)(torch.zeros(2, 3, 64, 64)).shape == (2, 512)
