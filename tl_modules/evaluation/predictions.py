"""Writes what `tl predict` finds as a CSV."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tl_modules.batch import samples
from tl_modules.errors import UserError
from tl_modules.module import TransferModule

__all__ = ["PredictionTable"]


class PredictionTable(Callback):
    """A row per sample: id (a path, where there is one), then the task's columns.

    Args:
        file: The CSV.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: dict[int, dict[str, Any]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds out before the work whether the file can be written.

        Raises:
            UserError: It cannot.
        """
        try:
            if trainer.is_global_zero:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self.file.open("a").close()
        except OSError as error:
            raise UserError(f"out: {self.file} cannot be written ({error.strerror})") from error

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keeps the batch's rows."""
        assert isinstance(pl_module, TransferModule)
        prediction, rows = outputs
        columns = pl_module.prediction_columns(samples.move(prediction, "cpu"))
        for i, row in enumerate(rows.tolist()):
            self.rows[row] = {name: values[i] for name, values in columns.items()}

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers the rows of all processes and writes them in the data's order."""
        parts: list[Any] = [self.rows]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, self.rows)
        if not trainer.is_global_zero:
            return
        rows = {row: columns for part in parts for row, columns in part.items()}
        ids = trainer.datamodule.ids()  # type: ignore[attr-defined]
        with self.file.open("w", newline="") as file:
            writer = csv.writer(file)
            for number, row in enumerate(sorted(rows)):
                if number == 0:
                    writer.writerow(["id", *rows[row]])
                writer.writerow([ids[row], *rows[row].values()])
        print(f"{len(rows)} predictions in {self.file}")
