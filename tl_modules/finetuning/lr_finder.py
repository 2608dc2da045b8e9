"""Finds a learning rate: a factor grows with each step until the loss diverges (Smith, WACV 2017).

    rate of the head   1e-6 .......................... 1    every other group: its `lr_scale` times that
    suggestions        valley: half way down the longest fall of the smoothed loss, low after a long plateau
                       minimum: a tenth of the rate at its minimum; steepest: where it falls fastest, aggressive

Values that change during a run are held at their final value, so that nothing else affects the loss: all stages that
will train are unfrozen, and ramped weights of methods are full. The first step is the run's own, including a
closed-form head.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tl_modules.errors import UserError

DIVERGED = 4.0  # times the best loss
COLOURS = ("tab:red", "tab:green", "tab:orange")


def smoothed(losses: Sequence[float], beta: float = 0.9) -> list[float]:
    """Returns m_t / (1 - beta^t), where m_t = beta m_(t-1) + (1 - beta) loss_t, t counts from 1, and m_0 = 0.

    The mean lags by 1 / (1 - beta) steps: with fastai's 0.98 that would be half the sweep.
    """
    mean, means = 0.0, []
    for step, loss in enumerate(losses, 1):
        mean = beta * mean + (1 - beta) * loss
        means.append(mean / (1 - beta**step))
    return means


def diverges(means: Sequence[float]) -> bool:
    """Returns whether the last smoothed loss is worse than the first, and 4 times the best.

    Losses may be negative, so distances to the best count, beyond 3 times its absolute value.
    """
    best = min(means)
    return means[-1] > means[0] and means[-1] - best > (DIVERGED - 1) * abs(best)


def valley(means: Sequence[float]) -> int:
    """Returns the step half way down the longest falling subsequence (fastai's `valley`)."""
    tails: list[float] = []  # negated, the smallest end of a rising subsequence of each length
    end = 0
    for step, mean in enumerate(means):
        position = bisect_left(tails, -mean)
        if position == len(tails):
            end = step
        tails[position : position + 1] = [-mean]
    third = len(tails) / 3
    return max(0, end - len(tails)) + int(third) + int(third / 2)


def steepest(rates: Sequence[float], means: Sequence[float]) -> int:
    """Returns the step before the largest fall in the logarithm of the rate."""
    slopes = [(means[i + 1] - means[i]) / (math.log(rates[i + 1]) - math.log(rates[i])) for i in range(len(means) - 1)]
    return slopes.index(min(slopes))


def falls(losses: Sequence[float]) -> bool:
    """Returns whether the smoothed loss falls below that of the first tenth by more than the variation there.

    The variation is the standard deviation, or a thousandth of the loss if that is constant.
    """
    first = losses[: max(2, len(losses) // 10)]
    if len(losses) <= len(first):
        return False
    return min(smoothed(losses)) < fmean(first) - max(stdev(first), 1e-3 * abs(fmean(first)))


class LearningRateSweep(Callback):
    """Raises all learning rates together, from step to step, and records the losses.

    Args:
        min_lr: The head's rate in the first step.
        max_lr: The head's rate in the last step.
        steps: Number of optimizer steps.

    Attributes:
        rates: The head's rate in each step whose loss is recorded.
        losses: The loss of each step, a mean over accumulated batches and processes.
        ended: Why the sweep stopped early; None: the last rate was reached.

    Raises:
        UserError: The range is empty, or there are too few steps.
    """

    def __init__(self, min_lr: float = 1e-6, max_lr: float = 1.0, steps: int = 100) -> None:
        if not 0 < min_lr < max_lr < math.inf:
            raise UserError(f"min_lr, max_lr: {min_lr} must be above 0 and below {max_lr}")
        if steps < 10:
            raise UserError(f"steps: {steps} must be at least 10, to show where the loss falls")
        self.min_lr, self.max_lr, self.steps = min_lr, max_lr, steps
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.ended: str | None = None
        self.batches: list[float] = []

    @property
    def rate(self) -> float:
        """The head's rate in the current step: min_lr (max_lr / min_lr)^(step / (steps - 1))."""
        return float(self.min_lr * (self.max_lr / self.min_lr) ** (len(self.rates) / (self.steps - 1)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sets the rate of each group."""
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.rate * group.get("lr_scale", 1.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records the loss; stops if it diverges, or if a loss or weight is not finite."""
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches  # Lightning has divided it
        self.batches.append(float(trainer.strategy.reduce(loss, reduce_op="mean")))
        if trainer.global_step == len(self.rates):  # the optimizer has not stepped
            return
        loss, self.batches = fmean(self.batches), []
        if not math.isfinite(loss):
            self._end(trainer, f"the loss is not finite at {self.rate:.2g}")
            return
        self.rates.append(self.rate)
        self.losses.append(loss)
        trained = [p.detach().isfinite().all() for p in pl_module.parameters() if p.requires_grad]
        if not torch.stack(trained).all():
            self._end(trainer, f"the weights are not finite after {self.rates[-1]:.2g}")
        elif diverges(smoothed(self.losses)):
            self._end(trainer, f"the loss diverges at {self.rates[-1]:.2g}")

    def _end(self, trainer: Trainer, why: str) -> None:
        self.ended, trainer.should_stop = why, True

    def suggestions(self) -> dict[str, float]:
        """Returns the rates by `valley`, `minimum` and `steepest`; {} if the loss does not fall.

        As in fastai, the first tenth of the steps, where the mean is over few batches, and the last 5 are left out.
        """
        if not falls(self.losses):
            return {}
        means = smoothed(self.losses)
        shown = slice(self.steps // 10, -5)
        rates, means = self.rates[shown], means[shown]
        if len(means) < 2:
            return {}
        return {
            "valley": rates[valley(means)],
            "minimum": rates[means.index(min(means))] / 10,
            "steepest": rates[steepest(rates, means)],
        }

    def figure(self) -> Any:
        """Returns a matplotlib figure of loss over rate, with the suggestions."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        means = smoothed(self.losses)
        axes.plot(self.rates, self.losses, ".", color="0.75", markersize=4, label="loss of a step")
        axes.plot(self.rates, means, color="tab:blue", label="smoothed")
        for (name, rate), colour in zip(self.suggestions().items(), COLOURS, strict=False):
            axes.axvline(rate, color=colour, linewidth=1, label=f"{name}: {rate:.2g}")
        if means:
            low, high = min(means), max(means[0], *means[: max(1, 9 * len(means) // 10)])
            room = (high - low) or 1.0
            axes.set_ylim(low - 0.2 * room, high + 0.5 * room)
        axes.set(xscale="log", xlabel="learning rate of the head", ylabel="training loss", title=self.ended)
        axes.legend()
        return figure
