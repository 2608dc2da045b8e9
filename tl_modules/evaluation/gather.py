"""What an evaluation reads, and what it finds of each sample, on all processes."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from tl_modules.batch import samples
from tl_modules.batch.ranks import every_rank


def eval_dataloaders(trainer: Trainer) -> list[Any]:
    """The loaders of the validation, test or prediction that is under way, also where there is but one."""
    fn = trainer.state.fn
    given: Any = getattr(trainer, f"{fn.value}_dataloaders") if fn in ("test", "predict") else trainer.val_dataloaders
    return given if isinstance(given, list) else [given]


class Gathering:
    """Keeps what a pass finds of each sample, and puts together what those of all processes have kept.

    Args:
        loader: What is read; its sampler's `rows` are the numbers of this process's samples, else they are 0, 1, ...
            None where `add` is told them.
    """

    def __init__(self, loader: Any = None) -> None:
        dataset = getattr(loader, "dataset", ())
        self.coming = iter(getattr(getattr(loader, "sampler", None), "rows", range(len(dataset))))
        self.rows: list[int] = []
        self.trees: list[Any] = []

    def add(self, tree: Any, rows: Tensor | None = None) -> None:
        """Keeps a batch of samples, of the numbers `rows` (B,) or of the loader's next."""
        self.rows += islice(self.coming, samples.count(tree)) if rows is None else rows.tolist()
        self.trees.append(tree)

    def gathered(self, trainer: Trainer) -> tuple[list[int], Any]:
        """Gives every process the samples of all in the order of their numbers; all must call it.

        Returns:
            The numbers, and a batch of all samples on the CPU; `([], None)` where nothing was kept.
        """
        mine = samples.move(samples.concat(self.trees), "cpu") if self.trees else None
        parts = [(rows, tree) for rows, tree in every_rank(trainer, (self.rows, mine)) if rows]
        if not parts:
            return [], None
        rows = torch.tensor([row for part, _ in parts for row in part])
        order = rows.argsort()
        return rows[order].tolist(), samples.take(samples.concat([tree for _, tree in parts]), order)
