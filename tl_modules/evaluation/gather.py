"""What an evaluation reads, and what it finds of each sample, on all processes."""

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


class Spool:
    """Keeps what a pass finds of each sample, on disk once it takes more than 64 MiB, and returns it in order.

    Attributes:
        count: How many samples this process has added.
    """

    def __init__(self) -> None:
        self.file = tempfile.SpooledTemporaryFile(64 << 20)  # noqa: SIM115 - open as long as the pass
        self.batches: list[tuple[int, int, int]] = []  # the lowest and the highest number, and where it is in the file
        self.count = 0

    def add(self, tree: Any, rows: Tensor) -> None:
        """Keeps a batch of samples with the numbers `rows` (B,)."""
        self.batches.append((int(rows.min()), int(rows.max()), self.file.tell()))
        self.count += len(rows)
        pickle.dump((rows.cpu(), samples.copied(samples.move(tree, "cpu"))), self.file)  # a view would keep its whole

    def blocks(self, trainer: Trainer, size: int = 1 << 14) -> Iterator[tuple[list[int], Any]]:
        """Yields the samples of all processes in the order of their numbers; all processes must exhaust it.

        Args:
            trainer: Of the pass.
            size: The largest number of samples in a block.
        """
        end = 1 + max(every_rank(trainer, max((last for _, last, _ in self.batches), default=-1)))
        for start in range(0, end, size):
            stop = start + size
            read = [self._read(place, start, stop) for low, high, place in self.batches if low < stop and high >= start]
            parts = [part for own in every_rank(trainer, read) for part in own if len(part[0])]
            if parts:
                rows = torch.cat([rows for rows, _ in parts])
                order = rows.argsort()
                yield rows[order].tolist(), samples.take(samples.concat([tree for _, tree in parts]), order)

    def _read(self, place: int, start: int, stop: int) -> tuple[Tensor, Any]:
        """Reads what a batch has of a block."""
        self.file.seek(place)
        rows, tree = pickle.load(self.file)
        inside = (start <= rows) & (rows < stop)
        return rows[inside], samples.take(tree, inside)
