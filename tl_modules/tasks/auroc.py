"""The area under the ROC curve, by exact ranks as far as memory allows.

probabilities (N, C), labels (N,) -> ranks within each class's column -> (rank sum of the positives) -> AUROC (C,)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

EXACT = 2**26  # probabilities kept in memory, 256 MB
CLASSES = 200  # with more, computing it after each epoch can take longer than a small head's training
BINS, STEP = 2000, 0.02  # of the log-odds from -20 to 20
AT_ONCE = 2**22


class MacroAUROC(Metric):
    """The mean one-vs-rest AUROC of the classes in the labels; torchmetrics counts an absent class as 0.

    Exact, with ties as one half, as long as N x C is at most 67 million per process; above that all probabilities are
    put into 2,000 bins of their log-odds. (Even bins of the probability do not separate the samples of a rare class.)

    Args:
        num_classes: C.
        **kwargs: As for `torchmetrics.Metric`.
    """

    is_differentiable, higher_is_better, full_state_update = False, True, False
    probabilities: list[Tensor]
    labels: list[Tensor]
    binned: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes, self.costly = num_classes, num_classes > CLASSES
        self.add_state("probabilities", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")
        self.add_state("binned", torch.zeros(0, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds probabilities (B, C) and labels (B,)."""
        self.probabilities.append(_unsaturated(preds.detach().float()))
        self.labels.append(target)
        # decided by what all processes share: the number of batches and the size of the first one
        if len(self.binned) or len(self.labels) * self.probabilities[0].numel() > EXACT:
            self._bin()

    def compute(self) -> Tensor:
        """Returns a scalar; nan if all labels are of one class."""
        if len(self.binned):
            self._bin()
            negative, positive = self.binned.view(2, self.num_classes, BINS).double().unbind()
            below = negative.cumsum(1) - negative / 2
            areas = (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))
        elif not len(self.labels):
            return torch.tensor(torch.nan)
        else:
            preds, target = dim_zero_cat(self.probabilities), dim_zero_cat(self.labels)
            columns = max(1, AT_ONCE // len(preds))
            parts = torch.split(preds, columns, dim=1)
            areas = torch.cat([auroc(part, target, columns * number) for number, part in enumerate(parts)])
        return areas[areas.isfinite()].mean().float()

    def _bin(self) -> None:
        """Moves the stored probabilities into the bins."""
        if not len(self.binned):
            self.binned = torch.zeros(2 * self.num_classes * BINS, dtype=torch.long, device=self.binned.device)
        if len(self.labels):
            preds, target = dim_zero_cat(self.probabilities), dim_zero_cat(self.labels)
            odds = torch.where(preds > 1, torch.log(preds.double() - 1), torch.logit(preds.double()))
            bins = ((odds / STEP).floor() + BINS // 2).clamp(0, BINS - 1).long()
            classes = torch.arange(self.num_classes, device=preds.device)
            own = (target[:, None] == classes).long()
            self.binned += torch.bincount(
                ((own * self.num_classes + classes) * BINS + bins).flatten(), minlength=len(self.binned)
            )
        self.probabilities, self.labels = [], []


def _unsaturated(probabilities: Tensor) -> Tensor:
    """Replaces each probability p above 0.999 by 1 / (1 - p), with 1 - p as the sum of the other classes.

    The order stays, and those that float32 rounds to 1 are told apart.
    """
    likely = probabilities > 0.999
    others = probabilities.masked_fill(likely, 0).sum(1, keepdim=True)
    return torch.where(likely, 1 / others, probabilities)


def auroc(scores: Tensor, labels: Tensor, first: int = 0) -> Tensor:
    """Computes the one-vs-rest AUROC of some classes by ranks (Mann and Whitney), ties counted as one half.

    Args:
        scores: (N, K), for the classes `first` to `first` + K - 1.
        labels: Class numbers, (N,).
        first: The number of the first column's class.

    Returns:
        (K,); nan for a class that no label has, or all labels have.
    """
    columns = scores.T.contiguous()
    ordered = columns.sort(1).values
    ranks = (torch.searchsorted(ordered, columns) + torch.searchsorted(ordered, columns, right=True) + 1).double() / 2
    own = labels == torch.arange(first, first + len(columns), device=labels.device)[:, None]
    positive = own.sum(1).double()
    negative = len(labels) - positive
    above = (ranks * own).sum(1) - positive * (positive + 1) / 2
    return above / (positive * negative)
