"""AUROC is exact, for rare classes too, and close to it where memory does not allow that."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from tl_modules.tasks import auroc as module
from tl_modules.tasks.auroc import MacroAUROC


def drawn(samples=300, classes=4, digits=None):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(samples, classes, generator=generator).mul(3).softmax(1)
    if digits is not None:
        probabilities = probabilities.mul(10**digits).round().div(10**digits)
    return probabilities, torch.randint(classes, (samples,), generator=generator)


def computed(probabilities, labels, parts=3):
    metric = MacroAUROC(probabilities.shape[1])
    for p, y in zip(probabilities.chunk(parts), labels.chunk(parts), strict=True):
        metric.update(p, y)
    return float(metric.compute())


@pytest.mark.parametrize("digits", [None, 1])
def test_it_is_the_mean_over_the_classes_ties_as_one_half(digits):
    probabilities, labels = drawn(digits=digits)
    each = [roc_auc_score(labels == c, probabilities[:, c]) for c in range(4)]
    assert computed(probabilities, labels) == pytest.approx(sum(each) / 4, abs=1e-6)


def test_a_rare_class_that_is_ranked_perfectly():
    labels = torch.zeros(1000, dtype=torch.long)
    labels[:5] = 1
    rare = torch.where(labels == 1, 4e-4, 2e-4)  # all of them in one of 200 even bins
    assert computed(torch.stack([1 - rare, rare], 1), labels) == 1


def test_columns_are_ranked_in_parts(monkeypatch):
    probabilities, labels = drawn()
    whole = computed(probabilities, labels)
    monkeypatch.setattr(module, "AT_ONCE", 600)
    assert computed(probabilities, labels) == whole


def test_bins_of_the_log_odds_are_close_and_keep_rare_classes_apart(monkeypatch):
    probabilities, labels = drawn(3000)
    exact = computed(probabilities, labels)
    monkeypatch.setattr(module, "EXACT", 5000)
    metric = MacroAUROC(4)
    for p, y in zip(probabilities.chunk(30), labels.chunk(30), strict=True):
        metric.update(p, y)
    assert not metric.labels
    assert float(metric.compute()) == pytest.approx(exact, abs=1e-3)
    test_a_rare_class_that_is_ranked_perfectly()


def test_absent_classes_are_left_out():
    probabilities, labels = drawn()
    assert computed(probabilities, labels.clamp(max=2)) == pytest.approx(
        sum(roc_auc_score(labels.clamp(max=2) == c, probabilities[:, c]) for c in range(3)) / 3, abs=1e-6
    )
    assert computed(probabilities, torch.zeros(300, dtype=torch.long)) != computed(probabilities, labels)  # nan


@pytest.mark.parametrize("limit", [module.EXACT, 100])
def test_probabilities_that_are_rounded_to_one_keep_their_order(limit, monkeypatch):
    monkeypatch.setattr(module, "EXACT", limit)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (400,), generator=generator)
    gaps = torch.randn(400, generator=generator) * 2 + 5 * labels + 12  # from about 6 to 24
    logits = torch.stack([torch.zeros(400), gaps], 1)
    assert (logits.softmax(1)[:, 1] == 1).sum() > 50
    found = computed(logits.softmax(1), labels)
    assert found == pytest.approx(roc_auc_score(labels, gaps), abs=1e-6 if limit > 100 else 2e-3)
