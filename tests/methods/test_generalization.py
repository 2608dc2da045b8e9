"""Several sources, by hand."""

import numpy as np
import pytest
import torch
from cases import made
from torch import nn
from torch.nn import functional as F

from tl_modules import (
    IRM,
    MLDG,
    Batch,
    GroupDRO,
    MixStyle,
    Mixup,
    VREx,
)


def test_group_dro_turns_the_mean_into_the_weighted_sum():
    module, source, _ = made(GroupDRO(eta=0.5))
    risks = [F.cross_entropy(v.output, v.y) for v in source.split()]
    q = np.exp([0.5 * float(r) for r in risks])
    q /= q.sum()
    module.methods[0].reweight(module, source, None)
    assert module.methods[0](module, source, None) is None
    assert float(source.mean_loss) == pytest.approx(
        float(sum(w * float(r) for w, r in zip(q, risks, strict=True))), rel=1e-5
    )
    assert module.methods[0].q.tolist() == pytest.approx(q.tolist(), rel=1e-5)


def test_irm_by_hand():
    module, source, _ = made(IRM(penalty=100.0, anneal=0.5))

    def slope(output, y):  # d/dw CE(w output, y) at w = 1
        p = output.softmax(1)
        return ((p * output).sum(1) - output[torch.arange(len(y)), y]).mean()

    parts = [[slope(v.output[i::2], v.y[i::2]) for i in range(2)] for v in source.split()]
    penalty = float(sum(a * b for a, b in parts) / 2)
    method = module.methods[0]
    assert float(method(module, source, None)) == pytest.approx(penalty, rel=1e-4)
    method.anneal = 0.0
    assert float(method(module, source, None)) == pytest.approx(100 * penalty, rel=1e-4)


def test_vrex_is_the_variance_of_the_risks():
    module, source, _ = made(VREx())
    risks = [float(F.cross_entropy(v.output, v.y)) for v in source.split()]
    assert float(module.methods[0](module, source, None)) == pytest.approx(np.var(risks), rel=1e-4)


def test_mixup_mixes_samples_and_labels(monkeypatch):
    """`CE(output(l x_i + (1 - l) x_j), l y_i + (1 - l) y_j)` in place of the loss on the samples as they are."""
    module, source, target = made(Mixup())
    module.eval()
    monkeypatch.setattr("random.betavariate", lambda a, b: 0.7)
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n).roll(1))
    batch = {"source": Batch(source.x, source.y), "target": Batch(target.x)}
    x, y = 0.7 * source.x + 0.3 * source.x.roll(1, 0), torch.eye(3)[source.y]
    logs = module(x).log_softmax(1)
    expected = -((0.7 * y + 0.3 * y.roll(1, 0)) * logs).sum(1).mean()
    assert float(module.training_step(batch, 0)) == pytest.approx(float(expected), rel=1e-5)
    mixed = module.methods[0].transform_batch(module, batch)
    assert mixed["target"] is batch["target"]
    sources = {"source/a": Batch(torch.zeros(4, 5), torch.zeros(4).long()),
               "source/b": Batch(torch.ones(4, 5), torch.ones(4).long())}  # fmt: skip
    mixed = module.methods[0].transform_batch(module, sources)
    assert torch.allclose(mixed["source/a"].x, torch.full((4, 5), 0.3))  # with the other source
    assert torch.allclose(mixed["source/b"].y, torch.tensor([0.3, 0.7, 0.0]).expand(4, 3))


def test_mldg_goes_through_the_inner_step(monkeypatch):
    """Its gradient against finite differences of the same objective."""
    module, source, _ = made(MLDG(lr=0.5))
    module.double().eval()
    monkeypatch.setattr(torch, "randint", lambda *args: torch.tensor(1))
    x = source.x.double()

    def objective():
        views = module.forward_domains({"source/a": (x[:4], source.y[:4]), "source/b": (x[4:], source.y[4:])})
        return module.methods[0](module, views["source"], None)

    weight = module.head[1].weight
    (grad,) = torch.autograd.grad(objective(), weight)
    for place in ((0, 0), (1, 3), (2, 7)):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[place] += step
            values.append(float(objective()))
            with torch.no_grad():
                weight[place] -= step
        assert float(grad[place]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-9)


def test_mix_style_swaps_statistics(monkeypatch):
    method = MixStyle(p=1.0)
    method.train()
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n).flip(0))
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, shape: torch.zeros(shape))
    x, layer = torch.randn(2, 3, 6, 6), nn.Identity()
    y = method.mix(layer, (), x)
    assert torch.allclose(y.mean((2, 3)), x.flip(0).mean((2, 3)), atol=1e-5)
    assert torch.allclose(y.std((2, 3)), x.flip(0).std((2, 3)), atol=1e-4)
    layer.eval()
    assert method.mix(layer, (), x) is x


@pytest.mark.parametrize(("shape", "channels", "layer"), [
    ((2, 3, 6, 6), 1, nn.Conv2d(3, 3, 1)),  # images
    ((2, 6, 6, 3), 3, nn.Linear(3, 3)),  # Swin
    ((2, 7, 3), 2, nn.LayerNorm(3)),  # tokens of a ViT
    ((2, 3, 7), 1, nn.Conv1d(3, 3, 1)),  # waves
    ((2, 4, 4, 4), 3, nn.LayerNorm(4)), ((2, 4, 4, 4), 1, nn.BatchNorm2d(4)),
], ids=str)  # fmt: skip
def test_mix_style_finds_the_channels(shape, channels, layer, monkeypatch):
    method = MixStyle(p=1.0)
    method.train()
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n).flip(0))
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, shape: torch.zeros(shape))
    x = torch.randn(shape)
    y = method.mix(layer, (), x)
    dims = [d for d in range(1, len(shape)) if d != channels]
    assert torch.allclose(y.mean(dims), x.flip(0).mean(dims), atol=1e-5)  # each channel has the other sample's mean


def test_mldg_moves_no_running_statistics():
    module, source, _ = made(MLDG())
    before = {k: v.clone() for k, v in module.backbone.state_dict().items()}
    module.methods[0](module, source, None)
    assert all(torch.equal(v, before[k]) for k, v in module.backbone.state_dict().items())
