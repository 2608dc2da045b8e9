"""Progress: a bar in a terminal, otherwise one line per epoch."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from tl_modules.evaluation.monitor import floats, monitor_of

__all__ = ["EpochProgressBar", "LineProgress"]


def _shown(trainer: Trainer, module: LightningModule) -> dict[str, float]:
    """Returns the few metrics worth showing."""
    metrics = floats(trainer)
    return {key: metrics[key] for key in ("train/loss", "val/loss", monitor_of(module)[0]) if key in metrics}


class EpochProgressBar(RichProgressBar):
    """Lightning's rich bar, which remains for every epoch and shows the metrics of the last one."""

    def __init__(self) -> None:
        super().__init__(leave=True)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Returns the few metrics worth showing, instead of a truncated version number."""
        return {key: f"{value:.3f}" for key, value in _shown(trainer, pl_module).items()}


class LineProgress(ProgressBar):
    """Prints `epoch 3/9  train/loss 0.512  val/accuracy 0.873  4.1 s` after every epoch, counted from 0."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self.started = 0.0

    def disable(self) -> None:
        """Disables printing; Lightning calls this on all processes except the first."""
        self._enabled = False

    def enable(self) -> None:
        """Enables printing."""
        self._enabled = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the timer."""
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the line."""
        if not self._enabled:
            return
        shown = [f"{key} {value:.4f}" for key, value in _shown(trainer, pl_module).items()]
        seconds = time.perf_counter() - self.started
        last = f"/{trainer.max_epochs - 1}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        print(f"epoch {trainer.current_epoch}{last}", *shown, f"{seconds:.1f} s", sep="  ", flush=True)
