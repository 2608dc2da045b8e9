"""Weights that move with training: pure functions of its progress, so that a resumed run needs no saved state."""

from __future__ import annotations

from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.methods.functional import ramp

__all__ = ["Linear", "Ramp", "Schedule"]


class Schedule:
    """A weight as a function of how far training is; a subclass writes `__call__`."""

    def __call__(self, progress: float) -> float:
        """The weight at `progress`, the share of the run's optimizer steps that are done, in [0, 1]."""
        raise NotImplementedError


class Ramp(Schedule):
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


class Linear(Schedule):
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


Weight = float | Schedule


def at(weight: Weight, module: BaseTransferModule) -> float:
    """A weight as far as the module's training is, whether it moves or not."""
    return weight(module.progress) if isinstance(weight, Schedule) else weight
