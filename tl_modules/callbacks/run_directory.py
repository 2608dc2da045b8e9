"""Writes config.yaml, metrics.csv and metrics.json."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from tl_modules.callbacks.best import Best, floats
from tl_modules.errors import UserError
from tl_modules.runs import write_metrics


class RunDirectory(Callback):
    """Keeps the files of a run's directory up to date.

    Args:
        path: The directory; only the first process writes there.
        config: What config.yaml says, or None to leave the file alone.
    """

    def __init__(self, path: Path, config: dict[str, Any] | None) -> None:
        self.path = path
        self.config = config
        self.rows: list[dict[str, float]] = []
        self.best = Best()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes config.yaml before anything is trained.

        Raises:
            UserError: The directory cannot be written.
        """
        if self.config is None or not trainer.is_global_zero:
            return
        try:
            (self.path / "config.yaml").write_text(yaml.safe_dump(self.config, sort_keys=False))
        except OSError as error:
            raise UserError(f"the run directory {self.path} cannot be written ({error.strerror})") from error

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the metrics of `tl validate`; in `fit`, remembers those of the epoch that best.ckpt holds."""
        if trainer.state.fn == "validate":
            self._write(trainer, floats(trainer, "val/"))
        else:
            self.best.improved(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the epoch's row of metrics.csv."""
        rates = {f"lr/{g.get('name', i)}": g["lr"] for i, g in enumerate(trainer.optimizers[0].param_groups)}
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step, **floats(trainer), **rates}
        self.rows.append(row)
        if trainer.is_global_zero:
            columns = list(dict.fromkeys(key for row in self.rows for key in row))
            with (self.path / "metrics.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(self.rows)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the best epoch's metrics."""
        self._write(trainer, self.best.metrics)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the test metrics."""
        self._write(trainer, floats(trainer, "test/"))

    def _write(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if trainer.is_global_zero and metrics:
            write_metrics(self.path, metrics)
