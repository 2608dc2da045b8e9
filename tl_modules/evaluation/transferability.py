"""Transferability scores: how well features suit a task, without training; higher is better for all.

    frozen backbone -> features (N, D), labels (N,)                          -> logme, h_score, knn, linear_probe
    its source's classifier -> probabilities (N, S) of the source's classes  -> leep, nce

Labels are class numbers (N,), or, for scores that support them, floating-point values (N,) or (N, K). Scores on one
data set compare backbones; scores of different data sets are not comparable.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tl_modules.methods.functional import discriminant, ridge

__all__ = ["h_score", "knn", "leep", "linear_probe", "logme", "nce"]

FOLDS = 5


def logme(features: Tensor, labels: Tensor) -> float:
    """Computes the log maximum evidence: log p(y | features) / N of a Bayesian linear model, mean over outputs.

    The model is w ~ N(0, 1/alpha), y ~ N(features w, 1/beta), with the alpha and beta that make y most likely. Classes
    are one output each, 0 or 1. You et al., LogME: Practical Assessment of Pre-trained Models for Transfer Learning,
    ICML 2021. Their fixed-point iteration can end in a lower local maximum if N <= D; here all values of alpha / beta
    are considered.

    Args:
        features: (N, D), neither centred nor scaled.
        labels: Classes (N,), or values (N,) or (N, K).
    """
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]

    f = features.double().numpy()
    y = (labels if labels.is_floating_point() else F.one_hot(_numbered(labels))).double().numpy().reshape(len(f), -1)
    u, s, _ = np.linalg.svd(f, full_matrices=False)
    there = s > s[0] * max(f.shape) * torch.finfo(features.dtype).eps
    variances, inside = s[there] ** 2, (u.T @ y)[there] ** 2  # inside: the part of y that the features explain
    outside = ((y**2).sum(0) - inside.sum(0)).clip(1e-12)

    def evidence(log_ratio: float, inside: Any = inside, outside: Any = outside) -> Any:
        """Returns the evidence of each output, at this log(alpha / beta) and the best beta for it."""
        ratio = np.exp(log_ratio)
        error = outside + (ratio / (ratio + variances)) @ inside
        complexity = np.log1p(variances / ratio).sum() / len(f)
        return (np.log(len(f) / (2 * math.pi * error)) - complexity - 1) / 2

    # far below the smallest variance the error is 0, and the evidence is unbounded if samples are repeated
    low, high = (math.log(variances[-1]) - 7, math.log(variances[0]) + 12) if len(variances) else (0.0, 1.0)
    steps = np.arange(low, high, 0.5)
    highest = steps[np.stack([evidence(step) for step in steps]).argmax(0)]
    found = [
        -minimize_scalar(
            lambda x, k=k: -evidence(x, inside[:, k], outside[k]),
            bounds=(max(low, highest[k] - 0.5), highest[k] + 0.5),
            method="bounded",
        ).fun
        for k in range(y.shape[1])
    ]
    return float(np.mean(found))


def h_score(features: Tensor, labels: Tensor, shrinkage: bool = True) -> float:
    """Computes the variance of the class means relative to that of the features: tr(cov(f)^-1 cov(E[f | y])).

    Bao et al., An Information-Theoretic Approach to Transferability in Task Transfer Learning, ICIP 2019. With few
    samples cov(f) is nearly singular, so that any features score well; Ledoit-Wolf shrinkage a avoids this,
    tr(cov_a(f)^-1 (1 - a) cov(E[f | y])): Ibrahim et al., Newer is not always better, ECML 2022.

    Args:
        features: (N, D).
        labels: Classes (N,).
        shrinkage: Whether to shrink.
    """
    from sklearn.covariance import ledoit_wolf

    f = features.double().numpy()
    f = f - f.mean(0)
    classes = _numbered(labels).numpy()
    counts = np.bincount(classes)
    means = np.stack([f[classes == c].mean(0) for c in range(len(counts))])
    between = (means * counts[:, None] / len(f)).T @ means
    covariance, share = ledoit_wolf(f, assume_centered=True) if shrinkage else (f.T @ f / len(f), 0.0)
    inverse = np.linalg.pinv(covariance, rcond=1e-10, hermitian=True)
    return float((1 - share) * (inverse * between).sum())  # both are symmetric


def nce(source: Tensor, labels: Tensor) -> float:
    """Computes the negative conditional entropy -H(y | z) of labels y given the most likely source class z; 0 at best.

    Tran et al., Transferability and Hardness of Supervised Classification Tasks, ICCV 2019.

    Args:
        source: Probabilities of the source's classes (N, S).
        labels: Classes (N,).
    """
    certain = F.one_hot(source.argmax(1), source.shape[1])
    return leep(certain, labels)  # with one class z per sample both are the mean of log p(y | z)


def leep(source: Tensor, labels: Tensor) -> float:
    """Computes the mean of log sum_z p(y | z) p(z | x): the log likelihood of labels predicted via source classes.

    Nguyen et al., LEEP: A New Measure to Evaluate Transferability of Learned Representations, ICML 2020.

    Args:
        source: Probabilities p(z | x) of the source's classes (N, S).
        labels: Classes (N,).
    """
    p, y = source.double(), _numbered(labels)
    joint = F.one_hot(y).double().T @ p / len(y)  # (C, S)
    given = joint / joint.sum(0).clamp(min=1e-300)
    return float((p * given[y]).sum(1).clamp(min=1e-300).log().mean())


def knn(features: Tensor, labels: Tensor, k: int = 5, temperature: float = math.inf) -> float:
    """Predicts each sample from its k nearest other samples by cosine: accuracy, or R2 of values.

    Args:
        features: (N, D).
        labels: Classes (N,), or values (N,) or (N, K).
        k: Number of neighbours; fewer if there are not enough samples.
        temperature: A neighbour counts by `exp(cos / temperature)` (0.07 in Wu et al., CVPR 2018); inf: all equally.
    """
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=min(k, len(features) - 1), metric="cosine").fit(features.double().numpy())
    distances, rows = map(torch.from_numpy, search.kneighbors())  # (N, k) each, excluding the sample itself
    near, weights = labels[rows], (-distances / temperature).softmax(1)
    if labels.is_floating_point():
        return _r2((weights.reshape(*weights.shape, *[1] * (near.ndim - 2)) * near).sum(1), labels)
    votes = (weights[..., None] * F.one_hot(near, int(labels.max()) + 1)).sum(1) * weights.shape[1]
    nearest = F.one_hot(near[:, 0], votes.shape[1])  # breaks ties
    return float(((votes + nearest / 2).argmax(1) == labels).double().mean())


def linear_probe(features: Tensor, labels: Tensor, seed: int = 0) -> float:
    """Computes the accuracy of shrinkage LDA, or R2 of ridge regression, on normalised features, in five folds.

    The initial solution of `FeatureExtraction`: the closed form of a `LinearHead`.

    Args:
        features: (N, D).
        labels: Classes (N,), or values (N,) or (N, K).
        seed: Seed of the folds.

    Returns:
        NaN if there is no closed form: fewer than two classes, or features so wide that it would take minutes.
    """
    from sklearn.model_selection import KFold, StratifiedKFold

    if len(labels) < 2:
        return math.nan
    f = F.layer_norm(features.float(), features.shape[1:])
    continuous = labels.is_floating_point()
    most = 1 if continuous else int(torch.bincount(labels).max())  # at most this many stratified folds
    kind, count = (StratifiedKFold, most) if most > 1 else (KFold, len(labels))
    folds: Any = kind(min(FOLDS, count), shuffle=True, random_state=seed)
    found = torch.full_like(labels, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes with fewer samples than folds
        splits = list(folds.split(f, labels))
    for train, held in splits:
        fit: Callable[..., Any] = ridge if continuous else discriminant
        solved = fit(f[train], labels[train], *([] if continuous else [int(labels.max()) + 1]))
        if solved is None:
            return math.nan
        output = F.linear(f[held], *solved)
        found[held] = output.view_as(found[held]).to(found.dtype) if continuous else output.argmax(1)
    return _r2(found, labels) if continuous else float((found == labels).double().mean())


def _numbered(labels: Tensor) -> Tensor:
    """Renumbers the classes that occur from 0 on."""
    numbers: Tensor = torch.unique(labels, return_inverse=True)[1]
    return numbers


def _r2(predicted: Tensor, values: Tensor) -> float:
    """Computes the mean over the outputs of 1 - squared error / variance; 0 for a constant output."""
    predicted, values = (each.double().reshape(len(values), -1) for each in (predicted, values))
    spread = (values - values.mean(0)).square().sum(0)
    shares = 1 - (predicted - values).square().sum(0) / spread
    return float(shares[spread > 0].sum() / len(spread))
