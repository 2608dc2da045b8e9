"""The state that a checkpoint needs beside weights and optimizer, so that a resumed run equals an uninterrupted one.

The position within an epoch is saved by `Loader.state_dict` (datamodules/loaders.py); what trains follows from the
epoch or step (finetuning/base.py); here are the random generators and the running means of each process.
"""

from __future__ import annotations

import logging
import random
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tl_modules.batch.ranks import every_rank
from tl_modules.module import TransferModule

__all__ = ["ExactResume"]

log = logging.getLogger(__name__)


class ExactResume(Callback):
    """Saves every process's random states and running means, and restores them at the first step.

    Not earlier, because building loaders and loops also consumes random numbers.
    """

    def __init__(self) -> None:
        self.loaded: dict[str, Any] | None = None
        self.max_steps: int | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the state of each process."""
        mine: dict[str, Any] = {"epoch": trainer.current_epoch, "random": random_state()}
        if isinstance(pl_module, TransferModule):
            mine["terms"] = pl_module.terms.state_dict()
        checkpoint["ranks"] = every_rank(trainer, mine)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stores this process's state until the first step; an epoch cut short by `max_steps` continues there."""
        progress = checkpoint.get("loops", {}).get("fit_loop", {})
        _reopen_epoch(progress)
        if checkpoint["global_step"] < trainer.max_steps and _epoch_is_over(progress):
            # with `max_steps`, Lightning (2.6) continues within the epoch that has ended, and skips one
            self.max_steps, trainer.fit_loop.epoch_loop.max_steps = trainer.max_steps, -1
        ranks = checkpoint.get("ranks", [])
        self.loaded = ranks[trainer.global_rank] if len(ranks) == trainer.world_size else None
        if self.loaded is None and trainer.is_global_zero and trainer.training:
            log.warning(
                "random states were saved by %d processes, but this run has %d: it resumes, but not bit-exactly",
                len(ranks),
                trainer.world_size,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores `max_steps`."""
        if self.max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self.max_steps = self.max_steps, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restores the random states and running means."""
        if self.loaded is None:
            return
        restore_random_state(self.loaded["random"])
        # at an epoch's end the means are those of the previous epoch
        if isinstance(pl_module, TransferModule) and self.loaded["epoch"] == trainer.current_epoch:
            pl_module.terms.load_state_dict(self.loaded["terms"], pl_module.device)
        self.loaded = None


def _reopen_epoch(progress: dict[str, Any]) -> None:
    """Makes Lightning (2.6) continue within an unfinished epoch, with the order of that epoch.

    In its checkpoint such an epoch counts as processed, so the loaders would use the order of the next one.
    """
    batches, epochs = progress.get("epoch_loop.batch_progress", {}), progress.get("epoch_progress", {})
    if batches and not batches["is_last_batch"] and batches["current"]["ready"]:
        for counted in (epochs["total"], epochs["current"]):
            counted["processed"] = counted["completed"]


def _epoch_is_over(progress: dict[str, Any]) -> bool:
    epochs = progress.get("epoch_progress", {}).get("total", {})
    return bool(epochs) and epochs["started"] == epochs["processed"] == epochs["completed"] + 1


def random_state() -> dict[str, Any]:
    """Returns the states of torch's, numpy's and Python's global generators, as plain data."""
    name, keys, *rest = cast(Any, np.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Restores the generators from `random_state`."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])
    np.random.set_state(tuple(state["numpy"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
