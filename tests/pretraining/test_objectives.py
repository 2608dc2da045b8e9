"""Objectives against values computed by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from unlabelled import build

from tl_modules import DINO, GAN, SCARF, Autoencoder, SimCLR, VICReg
from tl_modules.pretraining.base import spread
from tl_modules.pretraining.layers import projector, upsampler
from tl_modules.pretraining.reconstruction import swap


def projecting(module, *embeddings):
    """The same module, whose projections are these."""
    module.project = lambda views: list(embeddings)
    return module


def total(terms):
    return float(sum(terms.values()))


def test_spread():
    assert spread(torch.eye(4)) == pytest.approx(2 * math.sqrt(0.25 - 0.0625))
    assert spread(torch.rand(9, 1) * torch.ones(9, 5) + 1) == pytest.approx(0, abs=1e-6)
    torch.manual_seed(0)
    assert spread(torch.randn(2000, 64)) == pytest.approx(1, abs=0.01)


def test_simclr():
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    other = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    # of three others one is the same direction, two are orthogonal
    expected = -math.log(math.exp(2) / (math.exp(2) + 2))
    assert total(projecting(build(SimCLR, temperature=0.5), z, other).objective(z, other)) == pytest.approx(expected)


def test_vicreg():
    torch.manual_seed(0)
    a, b = torch.randn(6, 3), torch.randn(6, 3)

    def covariance(z):
        c = torch.cov(z.T)
        return (c.square().sum() - c.diagonal().square().sum()) / 3

    variance = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (a, b)) / 2
    expected = 25 * (a - b).square().mean() + 25 * variance + covariance(a) + covariance(b)
    assert total(projecting(build(VICReg), a, b).objective(a, b)) == pytest.approx(float(expected), rel=1e-5)


def test_scarf():
    z, other = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    module = projecting(build(SCARF, "vector", temperature=0.5), z, other)
    assert total(module.objective(torch.randn(2, 5))) == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 1)))


def test_dino():
    module = build(DINO, dim=3).eval()
    views = torch.rand(4, 1, 12, 12), torch.rand(4, 1, 12, 12)
    before = module.criterion.center.fill_(0.1).clone()
    out = [module(view) for view in views]  # in the beginning the teacher is the student
    q = [((o - 0.1) / 0.04).softmax(1) for o in out]
    p = [(o / 0.1).log_softmax(1) for o in out]
    expected = -((q[0] * p[1]).sum(1).mean() + (q[1] * p[0]).sum(1).mean()) / 2
    assert total(module.objective(*views)) == pytest.approx(float(expected), rel=1e-4)
    assert torch.equal(module.criterion.center, before)  # an evaluation moves nothing


def test_the_teacher_of_dino_follows():
    module = build(DINO, momentum=0.9)
    with torch.no_grad():
        for parameter in module.head.parameters():
            parameter.fill_(1.0)
    before = [p.clone() for p in module.teacher[1].parameters()]
    module.update_teacher()
    for mine, old in zip(module.teacher[1].parameters(), before, strict=True):
        assert torch.allclose(mine, 0.9 * old + 0.1, atol=1e-6)
    assert not any(p.requires_grad for p in module.teacher.parameters())


def test_gan():
    module = build(GAN, smoothing=0.1).eval()
    nn.init.zeros_(module.head.weight)
    nn.init.constant_(module.head.bias, 2.0)
    real, fake = torch.zeros(4, 1, 12, 12, dtype=torch.uint8), module.generate(4)
    assert fake.shape == (4, 3, 12, 12)
    assert (fake.min() >= 0) & (fake.max() <= 1)
    yes, no = -math.log(1 / (1 + math.exp(-2))), -math.log(1 / (1 + math.exp(2)))
    expected = 0.9 * yes + 0.1 * no + no
    assert float(module.discriminator_loss(real, fake)) == pytest.approx(expected, rel=1e-5)


def test_what_is_generated_moves_no_statistics():
    module = build(GAN)
    module.train()
    one, other = torch.rand(4, 3, 12, 12), torch.rand(4, 3, 12, 12)
    module.discriminator_loss(one, other)
    moved = {k: v.clone() for k, v in module.backbone.state_dict().items()}
    again = build(GAN)
    again.train()
    again.judge(one)
    assert all(torch.equal(v, again.backbone.state_dict()[k]) for k, v in moved.items())


def test_swapped_values_are_those_of_other_rows():
    torch.manual_seed(0)
    x = torch.arange(60.0).view(20, 3)
    swapped, where = swap(x, 0.5)
    assert torch.equal(swapped[~where], x[~where])
    assert all(set(swapped[:, column].tolist()) <= set(x[:, column].tolist()) for column in range(3))
    assert 0.3 < where.float().mean() < 0.7
    assert (swapped != x).any()


def test_masked_patches_are_what_is_compared():
    module = build(Autoencoder, masked=0.5, patch=4)
    torch.manual_seed(0)
    x = torch.randint(0, 256, (3, 1, 12, 12), dtype=torch.uint8)
    destroyed, target, mask = module.destroy(x)
    assert destroyed.shape == target.shape == (3, 3, 12, 12)
    blocks = mask.view(3, 3, 4, 3, 4)
    assert torch.equal(blocks.amax((2, 4)), blocks.amin((2, 4)))
    inside = mask.bool().expand(-1, 3, -1, -1)
    assert torch.allclose(module.backbone.preprocess(destroyed)[inside], torch.zeros(()), atol=1e-5)
    assert torch.allclose(destroyed[~inside], (x / 255).expand(-1, 3, -1, -1)[~inside])
    module.destroy = lambda x: (destroyed, target, mask)
    restored = target + 2 * mask + 100 * (1 - mask)
    assert total(projecting(module, restored).objective(x)) == pytest.approx(4.0, rel=1e-5)


def test_noise_leaves_the_target_alone():
    module = build(Autoencoder, noise=0.3)
    x = torch.randint(0, 256, (40, 1, 12, 12), dtype=torch.uint8)
    destroyed, target, mask = module.destroy(x)
    assert mask is None
    assert torch.allclose(target, module.backbone.preprocess(x), atol=1e-5)
    assert float((destroyed - x / 255).std()) == pytest.approx(0.3, rel=0.05)
    clean = projecting(module, target)
    assert total(clean.objective(x)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("size", [12, 28, 32, 50, 64])
def test_images_have_the_size_that_was_asked_for(size):
    assert upsampler(6, 3, size, 4)(torch.randn(2, 6)).shape == (2, 3, size, size)


def test_projectors():
    kinds = [type(layer).__name__ for layer in projector([4, 8, 2], last_norm=True)]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert [type(layer).__name__ for layer in projector([4, 2])] == ["Linear"]
