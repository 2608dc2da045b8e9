"""Weights that move with training: pure functions of its progress, so that a resumed run needs no saved state."""

from __future__ import annotations

from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.methods.functional import ramp

__all__ = ["Linear", "LinearWeight", "Ramp", "RampWeight", "Schedule", "WeightSchedule"]


class WeightSchedule:
    """A weight as a function of how far training is; a subclass writes `__call__`."""

    def __call__(self, progress: float) -> float:
        """The weight at `progress`, the share of the run's optimizer steps that are done, in [0, 1]."""
        raise NotImplementedError


class RampWeight(WeightSchedule):
    """`to * (2 / (1 + exp(-gamma p)) - 1)`: from 0, steep at first (Ganin et al., JMLR 2016).

    Args:
        to: The weight that it comes near at the end.
        gamma: How steep; the paper takes 10.
    """

    def __init__(self, to: float = 1.0, gamma: float = 10.0) -> None:
        self.to, self.gamma = to, gamma

    def __call__(self, progress: float) -> float:
        """The weight at `progress`."""
        return self.to * ramp(progress, self.gamma)


class LinearWeight(WeightSchedule):
    """From `start` to `end` in a straight line, reached at `until`, and constant from there.

    Args:
        start: The first weight.
        end: The last weight.
        until: The progress at which `end` is reached, above 0.
    """

    def __init__(self, start: float = 0.0, end: float = 1.0, until: float = 1.0) -> None:
        self.start, self.end, self.until = start, end, until

    def __call__(self, progress: float) -> float:
        """The weight at `progress`."""
        return self.start + (self.end - self.start) * min(1.0, progress / self.until)


# earlier names, which a config or a schedule of your own may hold
Schedule, Ramp, Linear = WeightSchedule, RampWeight, LinearWeight

LossWeight = float | WeightSchedule


def current_weight(weight: LossWeight, module: BaseTransferModule) -> float:
    """The weight's current value: a number as it is, a schedule at `module.progress`."""
    return weight(module.progress) if isinstance(weight, WeightSchedule) else weight
