"""Finds the largest batch size that fits into memory, by trial."""

from __future__ import annotations

import copy
import gc
import logging
import resource
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.memory import is_oom_error

from tl_modules.cache.memory import free_memory
from tl_modules.errors import UserError
from tl_modules.runs.resume import random_state, restore_random_state

log = logging.getLogger(__name__)
SHARE = 0.8  # of the free RAM; the kernel kills a process that exceeds it


def out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that device memory or RAM was insufficient."""
    return isinstance(error, MemoryError) or is_oom_error(error)


def largest_that_fits(fits: Callable[[int], bool], start: int, most: int) -> int:
    """Returns the largest of start, 2 start, 4 start, ... (or start / 2, ...) that fits, at most `most`.

    Args:
        fits: Tries a size.
        start: The first size.
        most: The largest size.

    Raises:
        UserError: Not even 1 fits.
    """
    size = min(start, most)
    while not fits(size):
        if size == 1:
            raise UserError(
                "find_batch_size: not even a batch of one fits into memory; use a smaller backbone or image"
            )
        size //= 2
    if size == min(start, most):
        while size < most and fits(min(2 * size, most)):
            size = min(2 * size, most)
    return size


def find_batch_size(module: LightningModule, data: Any, trainer: Trainer, precision: str) -> int:
    """Trains and validates copies of the module with growing batches; the module and random states do not change.

    Args:
        module: The module to be trained.
        data: The datamodule; its `batch_size` is restored.
        trainer: The run's Trainer; only its accelerator is used.
        precision: The run's precision.

    Returns:
        The largest power-of-two multiple of the data's batch size (or fraction of it) that fits.
    """
    start: int = data.batch_size
    state = random_state()
    most = max(len(loader.sampler) for loader in data.train_dataloader().flattened)
    before, room = _peak(), free_memory()

    def fits(size: int) -> bool:
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if on_cpu and size > start and (_peak() - before) * 2 > SHARE * room:
            return False
        data.batch_size = size
        trial = Trainer(
            accelerator=trainer.strategy.root_device.type,
            devices=1,
            precision=precision,  # type: ignore[arg-type]
            max_epochs=1,
            limit_train_batches=2,
            limit_val_batches=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trial.fit(copy.deepcopy(module), data)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return False
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        return True

    try:
        return largest_that_fits(fits, start, most)
    finally:
        data.batch_size = start
        restore_random_state(state)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
