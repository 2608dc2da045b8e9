"""Each formula against a hand-computed value, a slow loop, or another library; gradients included."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tl_modules import UserError
from tl_modules.methods.functional import (
    certainty_weights,
    class_confusion,
    detached_call,
    entropy,
    joint_mmd,
    mmd,
    mutual_information,
    nuclear_norm,
    ramp,
    relative_coral,
    reverse_gradient,
    sliced_wasserstein,
    soft_cross_entropy,
    strong_augment,
)


def sample(rows, columns=4, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return shift + torch.randn(rows, columns, dtype=torch.double, generator=generator)


X, Y = sample(9), sample(7, seed=1, shift=0.7)
P = sample(6, 3, seed=2).softmax(1)


def test_reversal_flips_the_sign():
    x = X.clone().requires_grad_()
    y = reverse_gradient(x, 0.3)
    assert torch.equal(y, x)
    (y**2).sum().backward()
    assert torch.allclose(x.grad, -0.3 * 2 * x)


def test_ramp():
    assert ramp(0.0) == 0
    assert ramp(0.5, 10) == pytest.approx((1 - math.exp(-5)) / (1 + math.exp(-5)))


def test_a_frozen_module_passes_gradients_on_and_keeps_none():
    layer, x = torch.nn.Linear(4, 1).double(), X.clone().requires_grad_()
    detached_call(layer, x).sum().backward()
    assert layer.weight.grad is None
    assert torch.allclose(x.grad, layer.weight.expand(9, -1))


def mmd_by_loops(layers_x, layers_y):
    """V-statistic with the median heuristic's mean, one pair at a time."""
    n = len(layers_x[0])
    total, product = len(layers_x[0]) + len(layers_y[0]), {}
    for x, y in zip(layers_x, layers_y, strict=True):
        z = torch.cat([x, y]).numpy()
        squared = {(i, j): float(((z[i] - z[j]) ** 2).sum()) for i, j in itertools.product(range(total), repeat=2)}
        scale = sum(squared.values()) / (total * (total - 1))
        for pair, d in squared.items():
            k = sum(math.exp(-d / (2 * factor * scale)) for factor in (1 / 8, 1 / 4, 1 / 2, 1, 2))
            product[pair] = product.get(pair, 1.0) * k
    xs, ys = range(n), range(n, total)
    means = [np.mean([product[p] for p in itertools.product(a, b)]) for a, b in ((xs, xs), (ys, ys), (xs, ys))]
    return means[0] + means[1] - 2 * means[2]


def test_mmd():
    assert float(mmd(X, X)) == pytest.approx(0, abs=1e-12)
    assert float(mmd(X, X.flip(0))) == pytest.approx(0, abs=1e-12)
    assert float(mmd(X, Y)) == pytest.approx(mmd_by_loops([X], [Y]))
    assert float(joint_mmd([X, X[:, :2]], [Y, Y[:, 1:3]])) == pytest.approx(mmd_by_loops([X, X[:, :2]], [Y, Y[:, 1:3]]))
    assert float(mmd(torch.ones(4, 2), torch.ones(3, 2))) == pytest.approx(0, abs=1e-6)


def test_relative_coral_has_no_scale():
    x, y = torch.randn(30, 4), torch.randn(25, 4) @ torch.randn(4, 4)
    cx, cy = (torch.tensor(np.cov(z.numpy().T)) for z in (x, y))
    expected = (cx - cy).square().sum() / (cx.square().sum() + cy.square().sum())
    assert relative_coral(x, y) == pytest.approx(float(expected), rel=1e-4)
    assert relative_coral(100 * x, 100 * y) == pytest.approx(float(expected), rel=1e-4)
    assert relative_coral(x, x) == pytest.approx(0, abs=1e-6)
    assert relative_coral(x, 1e-6 * y) == pytest.approx(1, abs=1e-4)
    assert relative_coral(0 * x, 0 * y) == 0


@pytest.mark.parametrize("rows", [9, 7, 3])
def test_sliced_wasserstein_is_pots(rows):
    ot = pytest.importorskip("ot")
    directions = F.normalize(sample(4, 50, seed=3), dim=0)
    y = sample(rows, seed=1, shift=0.7)
    theirs = ot.sliced_wasserstein_distance(X.numpy(), y.numpy(), projections=directions.numpy())
    assert float(sliced_wasserstein(X, y, directions)) == pytest.approx(theirs**2)
    assert float(sliced_wasserstein(X, X, directions)) == 0


@pytest.mark.parametrize(
    "distance",
    [mmd, relative_coral, lambda x, y: sliced_wasserstein(x, y, F.normalize(sample(4, 5, seed=3), dim=0))],
    ids=["mmd", "coral", "swd"],
)
def test_gradients_of_the_distances(distance):
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    if distance is mmd:  # the kernel's scale passes no gradient on, so only directions that keep it can be compared
        value = distance(x, y)
        value.backward()
        assert x.grad.abs().sum() > 0
        assert torch.allclose(x.grad.sum(0) + y.grad.sum(0), torch.zeros(4, dtype=torch.double), atol=1e-12)
    else:
        assert torch.autograd.gradcheck(distance, (x, y))


def test_a_step_along_the_gradient_brings_the_samples_together():
    x = X.clone().requires_grad_()
    before = mmd(x, Y)
    before.backward()
    assert mmd(x.detach() - 0.1 * x.grad, Y) < before


def test_class_probabilities_by_hand():
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert entropy(p).tolist() == pytest.approx([math.log(2), 0.0])
    mean = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(mutual_information(p)) == pytest.approx(mean - math.log(2) / 2)
    weights = np.array([1 + 0.5, 2.0])
    assert certainty_weights(p).tolist() == pytest.approx(weights / weights.mean())
    assert soft_cross_entropy(torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.5, 0.5]])).tolist() == pytest.approx(
        [-0.5 * math.log(0.25) - 0.5 * math.log(0.75)]
    )


def test_nuclear_norm_is_numpys():
    assert float(nuclear_norm(P)) == pytest.approx(np.linalg.svd(P.numpy(), compute_uv=False).sum() / 6)


def test_class_confusion_by_loops():
    logits = sample(6, 3, seed=2)
    p = (logits / 2.5).softmax(1).numpy()
    weights = 1 + np.exp((p * np.log(p)).sum(1))
    weights = 6 * weights / weights.sum()
    confusion = np.array(
        [[sum(w * row[i] * row[j] for w, row in zip(weights, p, strict=True)) for j in range(3)] for i in range(3)]
    )
    confusion /= confusion.sum(1, keepdims=True)
    expected = sum(confusion[i, j] for i in range(3) for j in range(3) if i != j) / 3
    assert float(class_confusion(logits)) == pytest.approx(expected)
    assert float(class_confusion(100 * torch.eye(3))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["uint8", "float", "grey", "vector"])
def test_perturbed_samples_are_changed_but_of_their_kind(kind):
    torch.manual_seed(0)
    x = {
        "uint8": torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8),
        "float": torch.rand(8, 3, 16, 16),
        "grey": torch.rand(8, 1, 16, 16),
        "vector": torch.randn(8, 5),
    }[kind]
    y = strong_augment(x)
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    unit = x / 255 if kind == "uint8" else x
    assert not torch.allclose(y, unit)
    assert torch.allclose(strong_augment(x, 0.0), unit, atol=1e-5)
    if kind != "vector":
        assert y.min() >= 0
        assert y.max() <= 1
    torch.manual_seed(3)
    one = strong_augment(x)
    torch.manual_seed(3)
    assert torch.equal(one, strong_augment(x))


def test_what_cannot_be_perturbed_is_said():
    with pytest.raises(UserError, match="takes images or vectors, not tensors"):
        strong_augment(torch.rand(2, 3, 4))
