"""Collects what an evaluation computes for each sample, over all processes."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterator
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


class Spool:
    """Collects values for each sample of a pass, on disk above 64 MiB, and returns them in order.

    Attributes:
        count: Number of samples that this process has added.
    """

    def __init__(self) -> None:
        self.file = tempfile.SpooledTemporaryFile(64 << 20)  # noqa: SIM115 - open as long as the pass
        self.batches: list[tuple[int, int, int]] = []  # lowest and highest number, position in the file
        self.count = 0

    def add(self, tree: Any, rows: Tensor) -> None:
        """Adds the values of a batch of samples with the numbers `rows` (B,)."""
        self.batches.append((int(rows.min()), int(rows.max()), self.file.tell()))
        self.count += len(rows)
        pickle.dump((rows.cpu(), samples.copied(samples.move(tree, "cpu"))), self.file)  # not a view of its base

    def blocks(self, trainer: Trainer, size: int = 1 << 14) -> Iterator[tuple[list[int], Any]]:
        """Yields the samples of all processes, sorted by number; a collective call, and all must exhaust it.

        Args:
            trainer: The trainer of the pass.
            size: Maximum number of samples in a block.
        """
        end = 1 + max(every_rank(trainer, max((last for _, last, _ in self.batches), default=-1)))
        for start in range(0, end, size):
            stop = start + size
            read = [self._read(at, start, stop) for low, high, at in self.batches if low < stop and high >= start]
            parts = [part for own in every_rank(trainer, read) for part in own if len(part[0])]
            if parts:
                rows = torch.cat([rows for rows, _ in parts])
                order = rows.argsort()
                yield rows[order].tolist(), samples.take(samples.concat([tree for _, tree in parts]), order)

    def _read(self, offset: int, start: int, stop: int) -> tuple[Tensor, Any]:
        """Reads the part of a batch that belongs to a block."""
        self.file.seek(offset)
        rows, tree = pickle.load(self.file)
        inside = (start <= rows) & (rows < stop)
        return rows[inside], samples.take(tree, inside)
