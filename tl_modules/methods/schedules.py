"""Weights that change during training: pure functions of its progress, so a resumed run needs no saved state."""

from __future__ import annotations

from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.methods.functional import ramp

__all__ = ["LinearWeight", "RampWeight", "WeightSchedule"]


class WeightSchedule:
    """A weight as a function of training progress; a subclass implements `__call__`."""

    def __call__(self, progress: float) -> float:
        """Returns the weight at `progress`, the share of the run's optimizer steps that are done, in [0, 1]."""
        raise NotImplementedError


class RampWeight(WeightSchedule):
    """Returns `to * (2 / (1 + exp(-gamma p)) - 1)`: from 0, steep at first (Ganin et al., JMLR 2016).

    Args:
        to: The weight approached at the end.
        gamma: Steepness; 10 in the paper.
    """

    def __init__(self, to: float = 1.0, gamma: float = 10.0) -> None:
        self.to, self.gamma = to, gamma

    def __call__(self, progress: float) -> float:
        """Returns the weight at `progress`."""
        return self.to * ramp(progress, self.gamma)


class LinearWeight(WeightSchedule):
    """Changes linearly from `start` to `end`, reached at `until`, and is constant from there.

    Args:
        start: The first weight.
        end: The last weight.
        until: The progress at which `end` is reached, above 0.
    """

    def __init__(self, start: float = 0.0, end: float = 1.0, until: float = 1.0) -> None:
        self.start, self.end, self.until = start, end, until

    def __call__(self, progress: float) -> float:
        """Returns the weight at `progress`."""
        return self.start + (self.end - self.start) * min(1.0, progress / self.until)


LossWeight = float | WeightSchedule


def current_weight(weight: LossWeight, module: BaseTransferModule) -> float:
    """Returns the weight's current value: a number as it is, a schedule at `module.progress`."""
    return weight(module.progress) if isinstance(weight, WeightSchedule) else weight
