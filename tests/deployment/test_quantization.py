"""int8 in the checkpoint, floats when it is read; nothing but tensors and plain data."""

import pytest
import torch
from torch import nn

from tl_modules import Classification, ConvNet, UserError
from tl_modules.checkpoints.compressed import dequantized, run_dynamic

pytest.importorskip("torchao")

from tl_modules.deployment.quantization import quantize


def stored(module, kind, tmp_path):
    checkpoint = {"state_dict": module.state_dict()}
    quantize(module, checkpoint, kind)
    torch.save(checkpoint, tmp_path / "x.ckpt")
    return torch.load(tmp_path / "x.ckpt", weights_only=True)


def test_weights_within_half_a_step_and_the_rest_as_it_is(tmp_path):
    torch.manual_seed(0)
    module = Classification(ConvNet(16), 3).eval()
    with torch.no_grad():
        module.backbone.model[0][0].weight[0] = 0
        module.backbone.model[0][0].weight[1] *= 1000  # a scale of its own
    checkpoint = stored(module, "int8", tmp_path)
    scales, int8 = checkpoint["quantized"]["scales"], checkpoint["state_dict"]
    floats = dequantized(checkpoint)["state_dict"]
    for key, value in module.state_dict().items():
        if key not in scales:
            assert torch.equal(floats[key], value)
            continue
        assert int8[key].dtype == torch.int8
        scale = scales[key].view(-1, *[1] * (value.ndim - 1))
        torch.testing.assert_close(scale.flatten(), (value.flatten(1).abs().amax(1) / 127.5).clamp(min=1e-12))
        assert ((floats[key] - value).abs() <= scale / 2 * 1.001).all()
    layers = [n for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert scales.keys() == {f"{name}.weight" for name in layers}


def test_outputs_near_floats_in_a_quarter_of_the_bytes(tmp_path):
    torch.manual_seed(0)
    module = Classification(ConvNet(32), 3).eval()
    x = torch.rand(8, 3, 28, 28)
    before = module(x)
    checkpoint = stored(module, "int8", tmp_path)
    module.load_state_dict(dequantized(checkpoint)["state_dict"])
    assert (module(x) - before).abs().max() < 0.02 * before.abs().max()
    torch.save({"state_dict": module.state_dict()}, tmp_path / "float.ckpt")
    assert (tmp_path / "x.ckpt").stat().st_size < 0.3 * (tmp_path / "float.ckpt").stat().st_size


def test_other_contents_are_left_alone():
    for content in ({"state_dict": {"a": torch.ones(2)}}, {"epoch": 1}):
        assert dequantized(content) is content


def test_dynamic_computes_linear_layers_in_int8():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.randn(8, 64)
    with torch.no_grad():
        before = network(x)
        run_dynamic(network)
        after = network(x)
    assert "Int8" in type(network[0].weight).__name__
    assert 0 < (after - before).abs().max() < 0.05 * before.abs().max()


def test_dynamic_needs_linear_layers():
    network = nn.Conv2d(3, 4, 1)
    with pytest.raises(UserError, match="this network has none; use int8"):
        quantize(network, {"state_dict": network.state_dict()}, "int8_dynamic")
