"""Strategies that close stages: each is one line of `depth`."""

from __future__ import annotations

from tl_modules.errors import UserError
from tl_modules.finetuning.base import FineTuning


class Full(FineTuning):
    """Trains every stage from the start (the classical fine-tuning)."""

    def depth(self, epoch: int, stages: int) -> int:
        """All."""
        return stages


class FeatureExtraction(FineTuning):
    """Trains the head on a frozen backbone."""

    def depth(self, epoch: int, stages: int) -> int:
        """None."""
        return 0


class LastStages(FineTuning):
    """Trains the head and the last `k` stages.

    Args:
        k: How many stages, counted from the head.
        lr_decay: Learning rate of a stage relative to the one above it.
    """

    def __init__(self, k: int = 1, lr_decay: float = 1.0) -> None:
        super().__init__(lr_decay)
        if k < 0:
            raise UserError(f"k: {k} must not be negative")
        self.k = k

    def depth(self, epoch: int, stages: int) -> int:
        """The last k."""
        return min(self.k, stages)


class GradualUnfreezing(FineTuning):
    """Opens one more stage every `every` epochs, from the head down (Howard and Ruder, ACL 2018).

    Args:
        every: Epochs between two openings; the first stage opens after the first `every` epochs of the head alone.
        lr_decay: Learning rate of a stage relative to the one above it (the paper takes 1 / 2.6).
    """

    def __init__(self, every: int = 1, lr_decay: float = 1.0) -> None:
        super().__init__(lr_decay)
        if every < 1:
            raise UserError(f"every: {every} must be at least 1 epoch")
        self.every = every

    def depth(self, epoch: int, stages: int) -> int:
        """One more every so many epochs."""
        return min(epoch // self.every, stages)


class FreezeThenUnfreeze(FineTuning):
    """Trains the head alone for some epochs, then everything (fastai's fine_tune).

    Args:
        epochs: How many epochs the backbone stays closed.
        lr_decay: Learning rate of a stage relative to the one above it.
    """

    def __init__(self, epochs: int = 1, lr_decay: float = 1.0) -> None:
        super().__init__(lr_decay)
        if epochs < 0:
            raise UserError(f"epochs: {epochs} must not be negative")
        self.epochs = epochs

    def depth(self, epoch: int, stages: int) -> int:
        """None, then all."""
        return stages if epoch >= self.epochs else 0
