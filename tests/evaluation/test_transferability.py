"""Scores of features, against slow computations of their definitions."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from torch.nn import functional as F

from tl_modules.evaluation.transferability import h_score, knn, leep, linear_probe, logme, nce

RANDOM = torch.Generator()


@pytest.fixture(autouse=True)
def _seeded():
    RANDOM.manual_seed(0)


def data(samples, width, classes=3, noise=1.0):
    """Features around class means."""
    y = torch.arange(samples) % classes
    means = 2 * torch.randn(classes, width, generator=RANDOM)
    return means[y] + noise * torch.randn(samples, width, generator=RANDOM), y


def best_evidence(features, y):
    """The largest log N(y; 0, 1/beta + F F^T / alpha) / N, found by a general optimiser from several starts."""
    gram, one = features @ features.T, np.eye(len(y))

    def loss(logs):
        alpha, beta = np.exp(logs)
        return -multivariate_normal.logpdf(y, cov=one / beta + gram / alpha, allow_singular=True) / len(y)

    starts = [(a, b) for a in (-1.0, 3.0) for b in (0.0, 3.0)]
    return -min(
        minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12}).fun for start in starts
    )


# where features can fit everything the best beta may be infinite, to which the search does not go
@pytest.mark.parametrize(("samples", "width", "close"), [(40, 6, 1e-6), (20, 50, 1e-3)])
def test_logme_is_the_maximum_of_the_evidence(samples, width, close):
    x, y = data(samples, width, noise=3.0)
    columns = F.one_hot(y).double().numpy()
    expected = np.mean([best_evidence(x.double().numpy(), column) for column in columns.T])
    assert logme(x, y) == pytest.approx(expected, abs=close)


def test_logme_is_above_the_evidence_of_no_feature():
    """Where a sample is repeated and features are many, the fixed point from alpha = beta = 1 ends below it, at error 0."""
    x, y = data(90, 120, classes=9, noise=12.0)
    x[-9] = x[0]
    columns = F.one_hot(y).double()
    nothing = (-0.5 * (2 * math.pi * columns.square().mean(0)).log() - 0.5).mean()
    assert float(nothing) < logme(100 * x, y) < float(nothing) + 0.1


def test_logme_of_values():
    x = torch.randn(40, 5, generator=RANDOM)
    y = x[:, :2] @ torch.tensor([[1.0, 2.0], [0.5, -1.0]]) + 0.3 * torch.randn(40, 2, generator=RANDOM)
    found = [best_evidence(x.double().numpy(), column) for column in y.double().numpy().T]
    assert logme(x, y) == pytest.approx(np.mean(found), abs=1e-6)
    assert logme(x, y[:, 0]) == pytest.approx(found[0], abs=1e-6)
    assert logme(x, y[:, 0]) > logme(torch.randn(40, 5, generator=RANDOM), y[:, 0])


def test_h_score_of_two_classes_by_hand():
    x = torch.tensor([[0.0], [2.0], [4.0], [6.0]])
    y = torch.tensor([0, 0, 1, 1])
    assert h_score(x, y, shrinkage=False) == pytest.approx(4 / 5)  # variance of the means 1, 1, 5, 5 by that of x


def test_h_score_is_its_definition():
    from sklearn.covariance import LedoitWolf

    x, y = data(60, 5)
    means = torch.stack([x[y == c].mean(0) for c in y])
    cov = lambda f: np.cov(f.double().numpy().T, bias=True)  # noqa: E731
    assert h_score(x, y, shrinkage=False) == pytest.approx(np.trace(np.linalg.inv(cov(x)) @ cov(means)))
    shrunk = LedoitWolf().fit(x.double().numpy())
    expected = np.trace(np.linalg.inv(shrunk.covariance_) @ cov(means)) * (1 - shrunk.shrinkage_)
    assert h_score(x, y) == pytest.approx(expected)


def test_shrinkage_tells_noise_from_classes_where_samples_are_few():
    good, y = data(30, 200, noise=0.5)
    noise = torch.randn(30, 200, generator=RANDOM)
    assert h_score(noise, y, shrinkage=False) == pytest.approx(2)  # as good as perfect: classes - 1
    assert h_score(noise, y) < 1 < h_score(good, y)


def test_leep_by_hand():
    source = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]])
    y = torch.tensor([0, 1, 1])
    # p(y | z) is [[.8, .2], [.7, 1.3]] / [1.5, 1.5]
    said = [0.8 * 0.8 + 0.2 * 0.2, 0.6 * 0.7 + 0.4 * 1.3, 0.1 * 0.7 + 0.9 * 1.3]
    assert leep(source, y) == pytest.approx(np.mean(np.log(np.array(said) / 1.5)))


def test_leep_between_its_bounds():
    """The edge cases of the authors of Stable Transfer: 0 where source and target agree, -log C where they have nothing in common."""
    y = torch.arange(3000) % 5
    assert leep(F.one_hot(y, 30).float(), y) == pytest.approx(0)
    assert leep(torch.randn(3000, 30, generator=RANDOM).softmax(1), y) == pytest.approx(-math.log(5), abs=0.01)


def test_nce_by_hand():
    z = torch.tensor([0, 0, 0, 1])
    y = torch.tensor([4, 4, 7, 7])  # numbers may leave gaps
    # H(y | z = 0) of shares 2/3, 1/3; none for z = 1
    expected = 3 / 4 * (2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert nce(F.one_hot(z).float(), y) == pytest.approx(expected)


def test_knn_by_hand():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 0.05]])
    y = torch.tensor([0, 0, 1, 1, 1])  # the last lies among the others
    assert knn(x, y, k=1) == pytest.approx(2 / 5)  # the third and the fourth have each other
    near = [2 / 3, 2 / 3, 1.0, 1.0, 1 / 3]  # means of the three nearest, of [0, 0, 1, 1, 1] as values
    distances = F.normalize(x) @ F.normalize(x).T
    nearest = [[i for i in distances[row].argsort(descending=True).tolist() if i != row][:3] for row in range(5)]
    near = y.double()[torch.tensor(nearest)].mean(1)
    expected = 1 - (near - y).square().sum() / (y - y.double().mean()).square().sum()
    assert knn(x, y.double(), k=3) == pytest.approx(float(expected))


def test_linear_probe_is_cross_validated():
    x, y = data(60, 8, noise=0.3)
    assert linear_probe(x, y) > 0.95
    noise = torch.randn(60, 100, generator=RANDOM)  # which a fit to all samples would separate
    assert linear_probe(noise, y) < 0.6


def test_linear_probe_of_values_and_rare_classes():
    x = F.layer_norm(torch.randn(60, 8, generator=RANDOM), (8,))
    y = x[:, :2].clone()
    assert linear_probe(x, y) > 0.95
    assert linear_probe(torch.randn(60, 8, generator=RANDOM), y) < 0.3
    assert 0 <= linear_probe(x, torch.tensor([0] * 30 + [1] * 29 + [2])) <= 1
    assert 0 <= linear_probe(x[:12], torch.arange(12) % 4) <= 1  # three of each class
    assert math.isnan(linear_probe(x, torch.zeros(60, dtype=torch.long)))


def test_knn_of_twins():
    features = torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.1, 1.0], [0.2, 1.0]])
    assert knn(features, torch.tensor([0, 0, 1, 1]), k=1, temperature=0.07) == 1.0
    assert knn(features, torch.tensor([0, 0, 0, 1]), k=1, temperature=0.07) == 0.5
    # each is given its twin's value, off by 1; the variance of 0, 1, 10, 11 is 25.25
    found = knn(features, torch.tensor([0.0, 1.0, 10.0, 11.0]), k=1, temperature=0.07)
    assert found == pytest.approx(1 - 1 / 25.25)


def test_knn_weighs_by_the_cosine():
    features = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)], [0.0, 2.0]])
    near, far = math.exp(math.sqrt(0.75) / 0.5), math.exp(0.5 / 0.5)  # cosines between the second and its neighbours
    predicted = [(far * 1 + 3) / (far + 1), (near * 3 + far * 0) / (near + far), (near * 1 + 0) / (near + 1)]
    values = [0.0, 1.0, 3.0]
    errors = sum((p - v) ** 2 for p, v in zip(predicted, values, strict=True))
    variance = sum((v - 4 / 3) ** 2 for v in values)
    assert knn(features, torch.tensor(values), k=2, temperature=0.5) == pytest.approx(1 - errors / variance)


@pytest.mark.parametrize("score", [logme, h_score, knn, linear_probe])
def test_better_features_score_higher(score):
    good, y = data(90, 20, noise=0.7)
    assert score(good, y) > score(torch.randn(90, 20, generator=RANDOM), y)
