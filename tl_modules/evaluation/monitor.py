"""Determines the best validation of a run so far.

best.ckpt is written by a RunCheckpoint (cli/command_line.py) that uses the same `monitor_of`; if the target's labels
are hidden, `ModelSelection` has set its criterion there.
"""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer


def monitor_of(module: LightningModule) -> tuple[str, str]:
    """Returns the metric that chooses the model, and "min" or "max"."""
    monitor: tuple[str, str] = getattr(module, "monitor", ("val/loss", "min"))
    return monitor


def floats(trainer: Trainer, prefix: str = "") -> dict[str, float]:
    """Returns the latest metrics whose names begin with `prefix`."""
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(prefix)}


class BestMetrics:
    """The validation metrics of the epoch that best.ckpt holds."""

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}

    def update(self, trainer: Trainer, module: LightningModule) -> bool:
        """Updates the metrics if the last validation is the best so far (nan never is); returns whether it is."""
        name, mode = monitor_of(module)
        now = floats(trainer, "val/")
        if trainer.sanity_checking or math.isnan(now.get(name, math.nan)):
            return False
        sign = 1 if mode == "max" else -1
        if self.metrics and sign * now[name] <= sign * self.metrics[name]:
            return False
        chosen_by = f"{name}, {'highest' if mode == 'max' else 'lowest'}"
        self.metrics = now | {"epoch": trainer.current_epoch, "chosen_by": chosen_by}
        return True

    def __str__(self) -> str:
        """Returns `epoch 7: val/accuracy 0.913 (highest)`; empty without validation."""
        if "chosen_by" not in self.metrics:
            return ""
        name, sense = self.metrics["chosen_by"].split(", ")
        return f"epoch {self.metrics['epoch']}: {name} {self.metrics[name]:.4g} ({sense})"
