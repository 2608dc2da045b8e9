"""Strategies that close stages: each is one line of `depth`."""

from __future__ import annotations

from typing import Any

from tl_modules.errors import UserError
from tl_modules.finetuning.base import LAST_STAGE_LR, PRETRAINED_LR, FineTuning, Unit


class Full(FineTuning):
    """Trains every stage from the start (the classical fine-tuning)."""

    def depth(self, now: float, stages: int) -> int:
        """All."""
        return stages


class FeatureExtraction(FineTuning):
    """Trains the head on a frozen backbone."""

    def depth(self, now: float, stages: int) -> int:
        """None."""
        return 0


class LastStages(FineTuning):
    """Trains the head and the last `k` stages.

    Where nothing else is said, a pretrained backbone gets 1 / (10 k) of the head's learning rate, at least 1/30.

    Args:
        k: How many stages, counted from the head.
        **kwargs: As for `FineTuning`.
    """

    def __init__(self, k: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 0:
            raise UserError(f"k: {k} must not be negative")
        self.k = k

    def relative_lr(self, random: bool) -> float:
        """More where less is open."""
        if self.backbone_lr is None and not random:
            return max(PRETRAINED_LR, LAST_STAGE_LR / max(1, self.k))
        return super().relative_lr(random)

    def depth(self, now: float, stages: int) -> int:
        """The last k."""
        return min(self.k, stages)


class GradualUnfreezing(FineTuning):
    """Opens one more stage every so often, from the head down (Howard and Ruder, ACL 2018).

    Args:
        every: How long between two openings, in `unit`; the first stage opens after the head has trained alone so long.
        unit: "epochs", "steps" (of the optimizer) or "fraction" (of all the run's steps).
        **kwargs: As for `FineTuning`; the paper takes 1 / 2.6 as `lr_decay`.
    """

    def __init__(self, every: float = 1, unit: Unit = "epochs", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.every, self.unit = _checked("every", every, unit), unit

    def depth(self, now: float, stages: int) -> int:
        """One more each time."""
        return min(int(now / self.every + 1e-9), stages)


class FreezeThenUnfreeze(FineTuning):
    """Trains the head alone for a while, then everything (fastai's fine_tune).

    Args:
        after: How long the backbone stays closed, in `unit`.
        unit: "epochs", "steps" (of the optimizer) or "fraction" (of all the run's steps).
        **kwargs: As for `FineTuning`.
    """

    def __init__(self, after: float = 1, unit: Unit = "epochs", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.after, self.unit = _checked("after", after, unit), unit

    def depth(self, now: float, stages: int) -> int:
        """None, then all."""
        return stages if now >= self.after else 0


def _checked(name: str, value: float, unit: Unit) -> float:
    if unit == "fraction" and not 0 < value < 1:
        raise UserError(f"{name}: {value} is no fraction of the run between 0 and 1")
    if unit != "fraction" and (value < 1 or value != int(value)):
        raise UserError(f"{name}: {value} must be a whole number of {unit}, at least 1 (or pass unit: fraction)")
    return value
