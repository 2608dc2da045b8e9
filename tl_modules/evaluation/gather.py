"""Collects what an evaluation computes for each sample, over all processes."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from tl_modules.batch import samples
from tl_modules.batch.ranks import every_rank


def eval_dataloaders(trainer: Trainer) -> list[Any]:
    """Returns the loaders of the current validation, test or prediction as a list, even if there is only one."""
    fn = trainer.state.fn
    given: Any = getattr(trainer, f"{fn.value}_dataloaders") if fn in ("test", "predict") else trainer.val_dataloaders
    return given if isinstance(given, list) else [given]


class Gathering:
    """Collects values for each sample of a pass, and merges those of all processes.

    Args:
        loader: The loader of the pass; its sampler's `rows` are the numbers of this process's samples, otherwise 0, 1,
            ... None if they are passed to `add`.
    """

    def __init__(self, loader: Any = None) -> None:
        dataset = getattr(loader, "dataset", ())
        self.coming = iter(getattr(getattr(loader, "sampler", None), "rows", range(len(dataset))))
        self.rows: list[int] = []
        self.trees: list[Any] = []

    def add(self, tree: Any, rows: Tensor | None = None) -> None:
        """Adds the values of a batch of samples, with numbers `rows` (B,) or the loader's next ones."""
        self.rows += islice(self.coming, samples.count(tree)) if rows is None else rows.tolist()
        self.trees.append(tree)

    def gathered(self, trainer: Trainer) -> tuple[list[int], Any]:
        """Returns the samples of all processes, sorted by number, to every process; a collective call.

        Returns:
            The numbers, and a batch of all samples on the CPU; `([], None)` if nothing was added.
        """
        mine = samples.move(samples.concat(self.trees), "cpu") if self.trees else None
        parts = [(rows, tree) for rows, tree in every_rank(trainer, (self.rows, mine)) if rows]
        if not parts:
            return [], None
        rows = torch.tensor([row for part, _ in parts for row in part])
        order = rows.argsort()
        return rows[order].tolist(), samples.take(samples.concat([tree for _, tree in parts]), order)
