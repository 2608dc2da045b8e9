"""`tl calibrate --run RUN`: fits a temperature for a run's logits on validation and stores it in the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from tl_modules.batch.output import DomainOutput
from tl_modules.checkpoints.files import AtomicCheckpointIO, load_checkpoint, write_metrics
from tl_modules.errors import UserError
from tl_modules.evaluation.calibration import calibration_of, fit_temperature
from tl_modules.module import TransferModule
from tl_modules.runs.directory import load_state_into


def calibrate(trainer: Trainer, module: TransferModule, data: LightningDataModule, file: Path) -> float:
    """Fits the temperature, writes it into the checkpoint, and prints its effect.

    Args:
        trainer: Runs the validation.
        module: The run's module.
        data: The data; uses its labelled validation split: the target's, or beside a hidden target the source's.
        file: The checkpoint. Everything else in it is kept.

    Returns:
        The temperature.

    Raises:
        UserError: The task has no classes, the validation split has no labels, or there is no best temperature.
    """
    if not module.is_classification:
        raise UserError(f"calibrate: {type(module).__name__} has no class probabilities to scale")
    if trainer.world_size > 1:
        raise UserError("calibrate: runs only in one process; pass --trainer.devices 1")
    content = load_checkpoint(file)
    load_state_into(module, dict(content))
    module.temperature = 1.0
    collected = _Collect()
    trainer.callbacks.append(collected)  # type: ignore[attr-defined]
    try:
        trainer.validate(module, datamodule=data, verbose=False)
    finally:
        trainer.callbacks.remove(collected)  # type: ignore[attr-defined]
    if not collected.labels:
        raise UserError("calibrate: the validation split has no labels; add labels, or a source, --data.source")
    logits, y = torch.cat(collected.logits), torch.cat(collected.labels)
    temperature = fit_temperature(logits, y)
    before, after = calibration_of(logits, y), calibration_of(logits, y, temperature)
    module.temperature = temperature
    AtomicCheckpointIO().save_checkpoint(content | {"temperature": temperature}, file)
    write_metrics(
        file.parent.parent,
        {
            "calibration/temperature": temperature,
            **{f"calibration/{name}": value for name, value in after._asdict().items()},
            **{f"calibration/{name}_before": value for name, value in before._asdict().items()},
        },
    )
    print(f"{len(y):,} validation samples of the {collected.domain}: temperature {temperature:.3f}")
    print(f"{'':8}{'ECE':>8}{'NLL':>8}{'accuracy':>10}")
    for name, row in (("before", before), ("after", after)):
        print(f"{name:8}{row.ece:>8.4f}{row.nll:>8.4f}{row.accuracy:>10.4f}")
    print(file)
    return temperature


class _Collect(Callback):
    """Collects logits and labels."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.domain = "target"

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, number: int = 0
    ) -> None:
        output: DomainOutput
        ((domain, output),) = outputs.items()
        if output.y is not None:
            self.domain = domain
            self.logits.append(output.output.detach().float().cpu())
            self.labels.append(output.y.cpu())
