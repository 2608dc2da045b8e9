"""Writes the features of all samples, which may be larger than memory."""

from __future__ import annotations

import csv
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from tl_modules.batch.ranks import every_rank
from tl_modules.checkpoints.files import AS_NAMED, replacing
from tl_modules.errors import UserError
from tl_modules.evaluation.gather import Spool
from tl_modules.module import TransferModule

Format = Literal["safetensors", "npy"]


def embed(
    trainer: Trainer, module: TransferModule, datamodule: LightningDataModule, folder: Path, format: Format
) -> None:
    """Writes the features of all splits and domains, as `TransferTrainer.embed` describes.

    Args:
        trainer: The trainer of the pass.
        module: Its backbone computes the features.
        datamodule: The data.
        folder: An existing folder.
        format: The file format of the features.

    Raises:
        UserError: There are no samples.
    """
    data: Any = datamodule
    data.collate = module.collate
    loaders: dict[tuple[str, str], Any] = data.all_dataloaders()
    spools = [Spool() for _ in loaders]
    collect = _Collect(spools)
    trainer.callbacks.append(collect)  # type: ignore[attr-defined]
    try:
        trainer.predict(_Features(module), dataloaders=list(loaders.values()), return_predictions=False)
    finally:
        trainer.callbacks.remove(collect)  # type: ignore[attr-defined]
    count = sum(every_rank(trainer, sum(spool.count for spool in spools)))
    if not count:
        raise UserError("data: there are no samples to embed")
    if not trainer.is_global_zero:
        for spool in spools:
            deque(spool.blocks(trainer), maxlen=0)  # this process only sends its part
        return
    with tempfile.TemporaryFile() as file:
        features = np.memmap(file, np.float32, "w+", shape=(count, collect.width))
    number = 0
    with replacing(folder / "index.csv") as part, part.open("w", newline="", **AS_NAMED) as index:
        writer = csv.writer(index)
        writer.writerow(["row", "domain", "split", "id", "label"])
        for (domain, split), spool in zip(loaders, spools, strict=True):
            ids, labels = data.ids_and_labels(domain, split)
            for rows, block in spool.blocks(trainer):
                features[number : number + len(rows)] = block.numpy()
                writer.writerows(
                    [position, domain, split, ids[row], labels[row]] for position, row in enumerate(rows, number)
                )
                number += len(rows)
        _save(features, folder / f"features.{format}")
    print(f"{count:,} samples, {collect.width} features each, in {folder}")


def _save(features: np.ndarray[Any, Any], path: Path) -> None:
    with replacing(path) as part:
        if path.suffix == ".npy":
            with part.open("wb") as stream:
                np.save(stream, features)
        else:
            from safetensors.torch import save_file

            save_file({"features": torch.from_numpy(features)}, part)


class _Features(LightningModule):
    """Returns the backbone's features and the row numbers."""

    def __init__(self, module: TransferModule) -> None:
        super().__init__()
        self.module, self.collate = module, module.collate

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> tuple[Tensor, Tensor]:
        ((_, part),) = batch.items()
        features = self.module.backbone.pooled_features(self.module.backbone(part.x))
        return self.module.bottleneck(features), part.index


class _Collect(Callback):
    """Collects features by loader."""

    def __init__(self, spools: Sequence[Spool]) -> None:
        self.spools, self.width = spools, 0

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, number: int = 0
    ) -> None:
        features, rows = outputs
        self.width = features.shape[1]
        self.spools[number].add(features.float(), rows)
