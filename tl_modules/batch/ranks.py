"""Communication between the processes of a run."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer


def every_rank(trainer: Trainer, mine: Any) -> list[Any]:
    """Returns every process's value to all processes, by rank; a collective call."""
    ranks = [mine] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(ranks, mine)
    return ranks
