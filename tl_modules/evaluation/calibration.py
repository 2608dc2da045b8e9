"""Calibration: of all predictions with probability 0.8, eight in ten should be right.

logits and labels of the validation split -> one temperature -> logits / temperature
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from tl_modules.errors import UserError

__all__ = ["Calibration", "calibration_of", "fit_temperature"]

BINS = 15


class Calibration(NamedTuple):
    """Measures of calibration.

    Attributes:
        ece: The expected calibration error over 15 bins (Naeini et al., AAAI 2015).
        nll: The mean negative log-likelihood, nats.
        accuracy: The share of correct predictions.
    """

    ece: float
    nll: float
    accuracy: float


def calibration_of(logits: Tensor, y: Tensor, temperature: float = 1.0) -> Calibration:
    """Measures logits (N, C), divided by a temperature, against class numbers (N,)."""
    scaled = logits.double() / temperature
    ece = multiclass_calibration_error(scaled.softmax(1), y, num_classes=logits.shape[1], n_bins=BINS)
    accuracy = (scaled.argmax(1) == y).double().mean()
    return Calibration(float(ece), float(F.cross_entropy(scaled, y)), float(accuracy))


def fit_temperature(logits: Tensor, y: Tensor) -> float:
    """Finds the temperature T with the least `mean CE(logits / T, y)` (Guo et al., ICML 2017), by L-BFGS.

    The loss is convex in 1 / T, over which it searches; predictions and their order do not change.

    Args:
        logits: (N, C).
        y: Class numbers (N,).

    Raises:
        UserError: There is no best temperature: every prediction is right, or the logits do not depend on the labels.
    """
    logits = logits.double()
    if bool((logits.argmax(1) == y).all()):
        raise UserError(
            f"calibrate: all {len(y)} validation samples are classified correctly, so the smallest "
            "temperature would be best; use a larger validation split"
        )
    inverse = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([inverse], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inverse * logits, y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    found = float(inverse.detach())
    if not found > 1e-3:
        raise UserError(
            "calibrate: the model's probabilities are no better than chance on the validation split, so no "
            "temperature helps; train it longer"
        )
    return 1 / found
