"""Progress where there is no terminal: one line an epoch."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar


class PlainProgress(ProgressBar):
    """Prints `epoch 3/10  train/loss 0.512  val/accuracy 0.873  4.1 s` after every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self.started = 0.0

    def disable(self) -> None:
        """Lightning calls this on all but the first process."""
        self._enabled = False

    def enable(self) -> None:
        """Prints again."""
        self._enabled = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the line."""
        if not self._enabled:
            return
        monitor: str = getattr(pl_module, "monitor", ("val/loss", ""))[0]
        metrics: dict[str, Any] = trainer.callback_metrics
        shown = [f"{key} {float(metrics[key]):.4f}" for key in ("train/loss", "val/loss", monitor) if key in metrics]
        seconds = time.perf_counter() - self.started
        last = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        print(
            f"epoch {trainer.current_epoch + 1}{last}", *dict.fromkeys(shown), f"{seconds:.1f} s", sep="  ", flush=True
        )
