"""Writes the predictions of `tl predict` as a CSV."""

from __future__ import annotations

import csv
from collections import deque
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from tl_modules.batch import samples
from tl_modules.checkpoints.files import AS_NAMED, replacing
from tl_modules.errors import UserError
from tl_modules.evaluation.ensembles import Ensemble
from tl_modules.evaluation.gather import Spool
from tl_modules.module import TransferModule

__all__ = ["PredictionWriter"]


class PredictionWriter(Callback):
    """Writes a row per sample: id (a path, if there is one), the task's columns, and an ensemble's uncertainty.

    Args:
        file: The CSV.
        top_k: How many classes are columns, the most probable ones of each sample; None: all of them.

    Raises:
        UserError: `top_k` is not positive, or nothing is classified.
    """

    def __init__(self, file: Path, top_k: int | None = None) -> None:
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k: {top_k} must be at least 1")
        self.file, self.top_k = file, top_k
        self.found = Spool()
        self.header: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks before the work that the file can be written, and that there are classes if `top_k` asks for them.

        Raises:
            UserError: One of these is not so.
        """
        assert isinstance(pl_module, TransferModule)
        if self.top_k and not (pl_module.is_classification or getattr(pl_module, "named_classes", [])):
            raise UserError(f"top_k: {type(pl_module).__name__} does not classify; leave it out")
        pl_module.top_k = self.top_k
        try:
            if trainer.is_global_zero:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                there = self.file.exists()
                self.file.open("a").close()
                if not there:
                    self.file.unlink()
        except OSError as error:
            raise UserError(f"out: {self.file} cannot be written ({error.strerror})") from error

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keeps the batch's rows until the end."""
        assert isinstance(pl_module, TransferModule)
        prediction, rows = outputs
        columns = pl_module.prediction_columns(samples.move(prediction, "cpu"))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            columns |= callback.columns(pl_module) if isinstance(callback, Ensemble) else {}
        self.header = list(columns)
        self.found.add(list(zip(*columns.values(), strict=True)), rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the rows of all processes in the data's order."""
        blocks = self.found.blocks(trainer)
        if not trainer.is_global_zero:
            deque(blocks, maxlen=0)  # this process only sends its part
            return
        ids, count = trainer.datamodule.ids(), 0  # type: ignore[attr-defined]
        with replacing(self.file) as part, part.open("w", newline="", **AS_NAMED) as file:
            writer = csv.writer(file)
            writer.writerow(["id", *self.header])
            for rows, values in blocks:
                writer.writerows([ids[row], *each] for row, each in zip(rows, values, strict=True))
                count += len(rows)
        print(f"{count} predictions in {self.file}")
