"""Each criterion against an independent or hand-computed value."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tl_modules.evaluation.criteria import CRITERIA, MANY, CriterionInputs, a_distance

X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
FEATURES = torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(60) % 5


def score(name, output=X, features=FEATURES, *source):
    return CRITERIA[name](CriterionInputs(output, features, *source))


def normal(samples, seed, shift=0.0, width=8):
    return torch.randn(samples, width, generator=torch.Generator().manual_seed(seed)) + shift


def test_entropy_by_hand():
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    by_hand = (math.log(2) + 0.25 * math.log(4) + 0.75 * math.log(4 / 3)) / 2
    assert score("entropy", p.log(), FEATURES[:2]) == pytest.approx(-by_hand)


def test_infomax_by_hand():
    sure = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    assert score("infomax", sure, FEATURES[:2]) == pytest.approx(math.log(2))
    assert score("infomax", sure[[0, 0]], FEATURES[:2]) == pytest.approx(0.0)


def test_snd_by_a_slow_loop():
    p = X.softmax(1).double().numpy()
    q = [row / math.sqrt(sum(v * v for v in row)) for row in p]
    total = 0.0
    for i in range(len(q)):
        weights = [math.exp(float(q[i] @ q[j]) / 0.05) for j in range(len(q)) if j != i]
        total += sum(-w / sum(weights) * math.log(w / sum(weights)) for w in weights)
    assert score("snd") == pytest.approx(total / len(q), rel=1e-5)


def test_bnm_by_numpy():
    p = X.softmax(1).numpy()
    assert score("bnm") == pytest.approx(np.linalg.svd(p, compute_uv=False).sum() / math.sqrt(60 * 5), rel=1e-5)


@pytest.mark.parametrize("samples", [10, 50, 500, 3])
def test_bnm_of_certain_and_diverse_outputs_is_one_whatever_their_number(samples):
    certain = 100 * F.one_hot(torch.arange(samples) % 5, 5).float()
    assert score("bnm", certain, normal(samples, 0)) == pytest.approx(1.0)


def test_class_cluster():
    features = 10 * F.one_hot(Y, 8) + 0.1 * FEATURES
    predicted = F.one_hot((Y + 2) % 5, 5).float()  # a cluster has no name
    assert score("class_cluster", predicted, features) == pytest.approx(1.0)
    shuffled = predicted[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    assert abs(score("class_cluster", shuffled, features)) < 0.1


def test_a_collapsed_model_has_no_clusters():
    assert score("class_cluster", F.one_hot(torch.zeros(60).long(), 5).float(), torch.ones(60, 8)) == 0.0


def test_dev_is_the_plain_risk_where_the_domains_are_the_same():
    alike = torch.ones(60, 8)
    assert score("dev", X, alike, X, alike, Y) == pytest.approx(-F.cross_entropy(X, Y).item(), rel=1e-6)
    output, y = normal(2000, 3, width=5), torch.arange(2000) % 5
    found = score("dev", output, normal(2000, 1), output, normal(2000, 2), y)
    assert found == pytest.approx(-F.cross_entropy(output, y).item(), rel=0.05)


def test_dev_weighs_what_looks_like_the_target():
    """The source is half of one kind and half of another, the target nine tenths of the one that is mistaken."""
    kind = torch.arange(1000) % 2
    features = kind[:, None] + 0.05 * normal(1000, 0, width=2)
    y = torch.zeros(1000).long()
    output = torch.stack([torch.zeros(1000), 3.0 * kind], 1)  # kind 1 is wrong
    target = (torch.arange(1000) % 10 > 0).float()[:, None] + 0.05 * normal(1000, 1, width=2)
    losses = F.cross_entropy(output, y, reduction="none")
    plain, wanted = losses.mean(), 0.1 * losses[kind == 0].mean() + 0.9 * losses[kind == 1].mean()
    found = -score("dev", torch.zeros(1000, 2), target, output, features, y)
    assert abs(found - wanted) < 0.1 * abs(plain - wanted)


def test_dev_without_a_source():
    assert score("dev") == -math.inf


def test_a_distance():
    assert a_distance(normal(2000, 0), normal(1500, 1)) < 0.15
    assert a_distance(normal(500, 0), normal(200, 1, shift=10)) == pytest.approx(2.0)
    assert a_distance(torch.ones(50, 3), torch.ones(20, 3)) == pytest.approx(0.0)
    # one feature, one apart: an error of Phi(-1/2) = 0.309
    assert a_distance(normal(2000, 0, width=1), normal(2000, 1, 1.0, 1)) == pytest.approx(2 - 4 * 0.3085, abs=0.08)
    assert math.isnan(a_distance(torch.full((9, 3), torch.nan), torch.ones(9, 3)))
    assert math.isnan(a_distance(torch.ones(1, 3), torch.ones(9, 3)))


@pytest.mark.parametrize("name", CRITERIA)
def test_the_better_adapted_model_scores_higher(name):
    """Features of the better model lie in the source's clusters; those of the worse one between them."""
    centres = 4 * torch.eye(5, 8)
    y = torch.arange(400) % 5
    source = centres[y] + 0.5 * normal(400, 0)

    def evidence(towards):
        target = (1 - towards) * centres[(y + 1) % 5] + towards * centres[y] + 0.5 * normal(400, 1)
        # what is far from the source is a mistake on the source's like
        return CriterionInputs(target @ centres.T, target, source @ centres.T * (0.2 + towards), source, y)

    assert CRITERIA[name](evidence(0.95)) > CRITERIA[name](evidence(0.55))


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["target_output", "target_features"])
def test_a_diverged_model_loses(name, value, part):
    given = {"target_output": X.clone(), "target_features": FEATURES.clone(), "source_output": X,
             "source_features": FEATURES, "source_y": Y}  # fmt: skip
    given[part][3, 1] = value
    assert CRITERIA[name](CriterionInputs(**given)) == -math.inf


@pytest.mark.parametrize("name", CRITERIA)
def test_few_samples(name):
    assert score(name, X[:1], FEATURES[:1], X, FEATURES, Y) == -math.inf
    assert math.isfinite(score(name, X[:2], FEATURES[:2], X, FEATURES, Y))


@pytest.mark.parametrize("name", CRITERIA)
def test_many_samples_score_the_same_each_time(name):
    many = MANY + 500
    output, features, y = normal(many, 0, width=5), normal(many, 1), torch.arange(many) % 5
    first = score(name, output, features, output, features, y)
    torch.rand(1)
    assert score(name, output, features, output, features, y) == first
