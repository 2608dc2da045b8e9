"""Decisions that all processes of a run take together, so that none waits for one that has given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lightning.pytorch import Trainer

from tl_modules.batch.ranks import every_rank
from tl_modules.cache.cut import CannotCut
from tl_modules.errors import UserError, disk_full

Result = TypeVar("Result")


def together(trainer: Trainer, work: Callable[[], Result]) -> Result:
    """Runs work at which a single process could fail; all processes continue, or none.

    Raises:
        CannotCut: A process raised it, and no process raised anything else.
        UserError: Another process raised something else; the process at fault raises its own error.
    """
    fault: Exception | None = None
    try:
        result = work()
    except Exception as error:  # the others must know of any error
        fault = CannotCut("the disk is full, so the entry cannot be written") if disk_full(error) else error
    mine = None if fault is None else (isinstance(fault, CannotCut), str(fault))
    told = [each for each in every_rank(trainer, mine) if each is not None]
    if not told:
        return result
    stops = [text for harmless, text in told if not harmless]
    if fault is not None and not (stops and isinstance(fault, CannotCut)):
        raise fault
    if stops:
        raise UserError(f"another process has stopped: {stops[0]}")
    raise CannotCut(f"{told[0][1]}, in another process")


def all_agree(trainer: Trainer, flag: bool) -> bool:
    """Returns whether a flag is set in every process."""
    return trainer.strategy.reduce_boolean_decision(flag, all=True) if trainer.world_size > 1 else flag
