"""What features are worth, without a second run: nearest neighbours among labelled ones, and how far they spread."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 1024  # whose neighbours are looked for at once


def neighbours(features: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The k nearest of the other samples by the cosine, and their weights `exp(cos / temperature)`.

    Args:
        features: (N, D).
        k: How many; all N - 1 others, where these are fewer.
        temperature: As in Wu et al. (CVPR 2018), 0.07.

    Returns:
        Their rows (N, k) and weights (N, k), which sum to 1.
    """
    unit = F.normalize(features.float())
    found = []
    for start in range(0, len(unit), ROWS):
        cosines = unit[start : start + ROWS] @ unit.T
        cosines[torch.arange(len(cosines)), torch.arange(start, start + len(cosines))] = -torch.inf
        found.append(cosines.topk(min(k, len(unit) - 1)))
    cosines, rows = (torch.cat(column) for column in zip(*found, strict=True))
    return rows, (cosines / temperature).softmax(1)


def knn_accuracy(features: Tensor, y: Tensor, k: int = 20, temperature: float = 0.07) -> float:
    """The share of samples whose class has most weight among their k nearest others; of (N, D) and (N,)."""
    rows, weights = neighbours(features, k, temperature)
    votes = torch.zeros(len(y), int(y.max()) + 1).scatter_add_(1, y[rows], weights)
    return float((votes.argmax(1) == y).float().mean())


def knn_r2(features: Tensor, y: Tensor, k: int = 20, temperature: float = 0.07) -> float:
    """R2 of the weighted mean of the values of the k nearest others, the mean over values; of (N, D) and (N, ...)."""
    rows, weights = neighbours(features, k, temperature)
    values = y.float().reshape(len(y), -1)
    errors = (values - (weights[..., None] * values[rows]).sum(1)).square().sum(0)
    return float((1 - errors / (values - values.mean(0)).square().sum(0).clamp(min=1e-12)).mean())


def spread(features: Tensor) -> float:
    """`sqrt(D) mean_d std(f_d / |f|)` of (N, D): 1 where directions are spread evenly, 0 where all are one.

    As Chen and He (SimSiam, CVPR 2021) watch for collapse.
    """
    unit = F.normalize(features.float())
    return float(unit.std(0, unbiased=False).mean() * unit.shape[1] ** 0.5)
