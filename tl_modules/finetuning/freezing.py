"""Strategies that freeze stages or parameters, one or two lines each."""

from __future__ import annotations

from typing import Any

from torch import nn

from tl_modules.errors import UserError
from tl_modules.finetuning.base import PART_LR, PRETRAINED_LR, FineTuning, Unit

__all__ = [
    "BitFit",
    "FeatureExtraction",
    "FirstStages",
    "FreezeThenUnfreeze",
    "FullFineTuning",
    "GradualUnfreezing",
    "LastStages",
    "NormOnly",
]


class FullFineTuning(FineTuning):
    """Trains every stage from the start (the classical fine-tuning)."""

    def trainable_stages(self, position: float, stages: int) -> range:
        """Returns all stages."""
        return range(stages)


class FeatureExtraction(FineTuning):
    """Trains the head on a frozen backbone."""

    def trainable_stages(self, position: float, stages: int) -> range:
        """Returns no stage."""
        return range(stages, stages)


class LastStages(FineTuning):
    """Trains the head and the last `k` stages.

    By default a pretrained backbone gets 1 / (10 k) of the head's learning rate, at least 1/30.

    Args:
        k: Number of stages, counted from the head.
        **kwargs: As for `FineTuning`.
    """

    def __init__(self, k: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 0:
            raise UserError(f"k: {k} must not be negative")
        self.k = k
        self.pretrained_lr = max(PRETRAINED_LR, PART_LR / max(1, k))

    def trainable_stages(self, position: float, stages: int) -> range:
        """Returns the last k stages."""
        return range(max(0, stages - self.k), stages)


class FirstStages(FineTuning):
    """Trains the head and the first `k` stages: surgical fine-tuning (Lee et al., ICLR 2023).

    For a target whose inputs look different (noise, blur, another sensor) while the labels mean the same.

    Args:
        k: Number of stages, counted from the input.
        **kwargs: As for `FineTuning`.
    """

    pretrained_lr = PART_LR

    def __init__(self, k: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise UserError(f"k: {k} must be at least 1")
        self.k = k

    def trainable_stages(self, position: float, stages: int) -> range:
        """Returns the first k stages."""
        return range(min(self.k, stages))


class GradualUnfreezing(FineTuning):
    """Unfreezes one more stage at regular intervals, from the head down (Howard and Ruder, ACL 2018).

    Args:
        every: Interval between two unfreezings, in `unit`; the head trains alone in the first interval.
        unit: "epochs", "steps" (of the optimizer) or "fraction" (of all the run's steps).
        **kwargs: As for `FineTuning`; the paper uses 1 / 2.6 as `lr_decay`.
    """

    def __init__(self, every: float = 1, unit: Unit = "epochs", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.every, self.unit = _checked("every", every, unit), unit

    def trainable_stages(self, position: float, stages: int) -> range:
        """Returns one more stage after each interval."""
        return range(max(0, stages - int(position / self.every + 1e-9)), stages)


class FreezeThenUnfreeze(FineTuning):
    """Trains the head alone for a while, then everything.

    This is fastai's `fine_tune`; with `after: 0.5, unit: fraction` it is LP-FT, linear probing, then fine-tuning (Kumar
    et al., ICLR 2022).

    Args:
        after: How long the backbone stays frozen, in `unit`.
        unit: "epochs", "steps" (of the optimizer) or "fraction" (of all the run's steps).
        **kwargs: As for `FineTuning`.
    """

    def __init__(self, after: float = 1, unit: Unit = "epochs", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.after, self.unit = _checked("after", after, unit), unit

    def trainable_stages(self, position: float, stages: int) -> range:
        """Returns no stage, then all."""
        return range(0 if position >= self.after else stages, stages)


class BitFit(FullFineTuning):
    """Trains the head and the biases of all layers (Ben Zaken et al., ACL 2022)."""

    pretrained_lr = PART_LR

    def trains(self, name: str, owner: nn.Module) -> bool:
        """Returns whether it is a bias."""
        return name.endswith("bias")


class NormOnly(FullFineTuning):
    """Trains the head, and scale and shift of all normalisation layers (Frankle et al., ICLR 2021)."""

    pretrained_lr = PART_LR

    def trains(self, name: str, owner: nn.Module) -> bool:
        """Returns whether the layer's class, or a base class of it, is named a norm."""
        return any("norm" in kind.__name__.lower() for kind in type(owner).__mro__)


def _checked(name: str, value: float, unit: Unit) -> float:
    if unit == "fraction" and not 0 < value < 1:
        raise UserError(f"{name}: {value} is not a fraction of the run between 0 and 1")
    if unit != "fraction" and (value < 1 or value != int(value)):
        raise UserError(f"{name}: {value} must be a whole number of {unit}, at least 1 (or pass unit: fraction)")
    return value
