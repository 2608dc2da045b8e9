"""Criteria that choose a model in unsupervised adaptation without any target label; higher is better for all.

    logits and features of the target's validation samples (and of the source's, with labels) -> a number

None of them measures accuracy, and each can be fooled: `entropy` by a model that puts everything into one class,
`class_cluster` by clusters that are not the classes, `dev` by domains that do not overlap.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import tl_modules.methods.functional as functional

MANY = 2000  # expensive criteria use at most this many samples, evenly spaced
FEW = 500  # the domain classifier uses at most this many samples of each domain


@dataclass(frozen=True)
class CriterionInputs:
    """The model's outputs that a criterion uses.

    Attributes:
        target_output: Logits of the target's validation samples, (N, C).
        target_features: Their features, (N, D).
        source_output: Logits of the source's validation samples, (M, C); None if there is no source.
        source_features: Their features, (M, D).
        source_y: Their labels, (M,).
    """

    target_output: Tensor
    target_features: Tensor
    source_output: Tensor | None = None
    source_features: Tensor | None = None
    source_y: Tensor | None = None


CriterionFunction = Callable[[CriterionInputs], float]


def _finite(criterion: CriterionFunction) -> CriterionFunction:
    """Makes a criterion return -inf if it cannot be computed: non-finite outputs, or fewer than two samples."""

    @wraps(criterion)
    def scored(inputs: CriterionInputs) -> float:
        given = [value for value in vars(inputs).values() if value is not None]
        if len(inputs.target_output) < 2 or not all(value.isfinite().all() for value in given):
            return -math.inf
        score = criterion(inputs)
        return score if math.isfinite(score) else -math.inf

    return scored


@_finite
def entropy(inputs: CriterionInputs) -> float:
    """Computes `-mean H(p)` (Morerio et al., ICLR 2018)."""
    return -functional.entropy(_probabilities(inputs)).mean().item()


@_finite
def infomax(inputs: CriterionInputs) -> float:
    """Computes the mutual information of input and class, `H(mean p) - mean H(p)`: confident and diverse."""
    return functional.mutual_information(_probabilities(inputs)).item()


@_finite
def snd(inputs: CriterionInputs) -> float:
    """Computes the soft neighbourhood density: whether many samples get similar predictions (Saito et al., ICCV 2021).

    `mean_i H(softmax_j(<q_i, q_j> / 0.05))` over j other than i, with q the probabilities scaled to length 1.
    """
    q = F.normalize(_few(_probabilities(inputs)).float())
    return functional.entropy((q @ q.T / 0.05).fill_diagonal_(-math.inf).softmax(1)).mean().item()


@_finite
def bnm(inputs: CriterionInputs) -> float:
    """Computes `||P||_* / sqrt(N min(N, C))`, at most 1: large if confident and diverse (Cui et al., CVPR 2020)."""
    p = _probabilities(inputs)
    return functional.nuclear_norm(p).item() * math.sqrt(len(p) / min(p.shape))


@_finite
def class_cluster(inputs: CriterionInputs) -> float:
    """Computes ClassAMI: whether predicted classes match clusters of features (Musgrave et al., arXiv 2208.07360).

    Adjusted mutual information between predicted classes and k-means of the features scaled to length 1, with as many
    clusters as classes: 1 if they are the same, 0 by chance.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_mutual_info_score

    classes = _few(inputs.target_output).argmax(1)
    if classes.min() == classes.max():  # a single class in a single cluster would count as perfect
        return 0.0
    features = F.normalize(_few(inputs.target_features).float())
    k_means = KMeans(min(inputs.target_output.shape), n_init=2, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fewer distinct features than classes
        clusters = k_means.fit_predict(features.numpy(force=True))
    return float(adjusted_mutual_info_score(classes.numpy(force=True), clusters))


@_finite
def dev(inputs: CriterionInputs) -> float:
    """Computes deep embedded validation: minus the importance-weighted source risk (You et al., ICML 2019).

    `-(mean w l + eta (mean w - 1))` with l the cross-entropy, w the density ratio of target to source features, and
    `eta = -cov(w l, w) / var(w)` the control variate.

    The paper fits the domain classifier, which gives w, on training samples; here it is fitted twice, on one half of
    the validation samples to weight the other half, so that no sample weights itself; its probabilities are clipped to
    [0.01, 0.99], since a single sample with a huge w would decide alone. Without a source the score is -inf.
    """
    if inputs.source_output is None or inputs.source_features is None or inputs.source_y is None:
        return -math.inf
    held_out = _domain_probabilities(inputs.source_features, inputs.target_features)
    if held_out is None:
        return -math.inf
    p = held_out[0].clip(0.01, 0.99)
    w = p / (1 - p)
    output, y = (_few(each, FEW) for each in (inputs.source_output, inputs.source_y))
    loss = F.cross_entropy(output.double(), y, reduction="none")
    weighted = w * loss.numpy(force=True)
    variance = w.var()
    eta = -((weighted - weighted.mean()) * (w - w.mean())).mean() / variance if variance > 1e-12 else 0.0
    return -float(weighted.mean() + eta * (w.mean() - 1))


CRITERIA: dict[str, CriterionFunction] = {
    "entropy": entropy,
    "infomax": infomax,
    "snd": snd,
    "bnm": bnm,
    "class_cluster": class_cluster,
    "dev": dev,
}


def a_distance(source_features: Tensor, target_features: Tensor) -> float:
    """Computes the proxy A-distance `2 (1 - 2 err)`, clipped at 0, of two domains (Ben-David et al., MLJ 2010).

    Args:
        source_features: (M, D).
        target_features: (N, D).

    Returns:
        With err the cross-validated error of a linear domain classifier, averaged over the domains: 0 if it guesses, 2
        if it is always right; nan if features are not finite, or a domain has fewer than two samples.
    """
    held_out = _domain_probabilities(source_features, target_features)
    if held_out is None:
        return math.nan
    source, target = held_out
    # a tie counts as half an error
    errors = [(side > 0.5).mean() + (side == 0.5).mean() / 2 for side in (source, 1 - target)]
    return max(0.0, 2 * (1 - float(np.sum(errors))))


def _domain_probabilities(source: Tensor, target: Tensor) -> tuple[Any, Any] | None:
    """Returns the probability that each source and each target sample is from the target, cross-fitted.

    Logistic regression on one half of each domain predicts the other half; both domains have equal weight.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    few = [_few(source, FEW), _few(target, FEW)]
    x, domain = torch.cat(few).float(), np.repeat([0, 1], [len(each) for each in few])
    if not x.isfinite().all() or min(len(source), len(target)) < 2:
        return None
    classifier = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", tol=1e-3, max_iter=50))
    folds = StratifiedKFold(2, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 50 steps come close enough to convergence
        p = cross_val_predict(classifier, x.numpy(force=True), domain, cv=folds, method="predict_proba")[:, 1]
    return p[domain == 0], p[domain == 1]


def _probabilities(inputs: CriterionInputs) -> Tensor:
    return inputs.target_output.double().softmax(1)


def _few(x: Tensor, many: int = MANY) -> Tensor:
    """Takes at most `many` rows, evenly spaced."""
    rows = np.linspace(0, len(x) - 1, min(many, len(x))).round()
    return x[torch.from_numpy(rows).long()]
