"""Writes config.yaml, metrics.csv and metrics.json."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from tl_modules.checkpoints.files import write_metrics, write_whole
from tl_modules.evaluation.monitor import BestMetrics, floats
from tl_modules.evaluation.test_time import TestTimeAdaptation
from tl_modules.finetuning.optimizer import NO_DECAY
from tl_modules.runs.directory import write_config

__all__ = ["RunFiles"]


class RunFiles(Callback):
    """Keeps the files in a run's directory up to date.

    Args:
        path: The directory; only the first process writes to it.
        config: The content of config.yaml; if empty, the file is not written.

    Attributes:
        trained: Whether there was anything left to train.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.trained = False
        self.rows: list[dict[str, float]] = []
        self.best = BestMetrics()
        self.validated = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes a new run's config.yaml before anything is trained.

        Raises:
            UserError: The directory cannot be written.
        """
        if not (self.path / "config.yaml").exists():
            self._write_config(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes a resumed run's config.yaml too, now that its checkpoint has been accepted."""
        self.trained = True
        self._write_config(trainer)

    def _write_config(self, trainer: Trainer) -> None:
        if self.config and trainer.is_global_zero:
            write_config(self.path, self.config)

    @property
    def state_key(self) -> str:
        """The earlier name of this class, under which checkpoints store its state."""
        return "RunDirectory"

    def state_dict(self) -> dict[str, Any]:
        """Returns the rows and the best epoch so far, so that a resumed run has those of an uninterrupted one."""
        return {"rows": self.rows, "best": self.best.metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the rows and the best epoch."""
        self.rows, self.best.metrics = list(state["rows"]), dict(state["best"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the metrics of `tl validate`; in `fit`, stores those of the epoch in best.ckpt."""
        self.validated = True
        if trainer.state.fn == "validate":
            self._write(trainer, floats(trainer, "val/"))
        else:
            self.best.update(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the epoch's row of metrics.csv, with validation metrics if there was a validation.

        The row of an epoch that `max_steps` has cut short is replaced by that of the whole epoch if the run is resumed.
        """
        rates = {f"lr/{g.get('name', i)}": g["lr"] for i, g in enumerate(trainer.optimizers[0].param_groups)}
        rates = {name: rate for name, rate in rates.items() if not name.endswith(NO_DECAY)}  # same as its group's
        others = ("lr-", *(() if self.validated else ("val/",)))  # for TensorBoard; from an earlier epoch
        self.validated = False
        metrics = {name: value for name, value in floats(trainer).items() if not name.startswith(others)}
        self.rows = [row for row in self.rows if row["epoch"] != trainer.current_epoch]
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step, **metrics, **rates}
        self.rows.append(row)
        if trainer.is_global_zero:
            columns = list(dict.fromkeys(key for row in self.rows for key in row))
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, columns)
            writer.writeheader()
            writer.writerows(self.rows)
            write_whole(self.path / "metrics.csv", text.getvalue())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the best epoch's metrics."""
        self._write(trainer, self.best.metrics)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the test metrics; those of a model that adapts to the test data have their own prefix."""
        names = [c.name for c in cast(Any, trainer).callbacks if isinstance(c, TestTimeAdaptation)]
        prefix = "/".join(["test", *names, ""])
        metrics = floats(trainer, "test/")
        self._write(trainer, {prefix + name.removeprefix("test/"): value for name, value in metrics.items()})

    def _write(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if trainer.is_global_zero and metrics:
            write_metrics(self.path, metrics)
