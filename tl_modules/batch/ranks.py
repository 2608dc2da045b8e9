"""What the processes of a run tell each other."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer


def every_rank(trainer: Trainer, mine: Any) -> list[Any]:
    """Gives each process what all of them have, by rank; all must call it."""
    ranks = [mine] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(ranks, mine)
    return ranks
