"""Batches of cache entries, which replace a batch that is read, or accompany it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tl_modules.batch import samples
from tl_modules.batch.cached import CachedActivations
from tl_modules.batch.samples import AnnotatedBatch, as_batch
from tl_modules.cache.columns import Table
from tl_modules.cache.cut import Cut
from tl_modules.cache.entry import converted

Array = np.ndarray[Any, Any]


class EntryRows:
    """Takes the rows of an entry by sample number, or by sample number with the seed that chooses a view.

    Args:
        loader: The loader whose data the entry holds.
        views: Number of views of each sample.
        dtype: Type in which converted values are used; None keeps the stored type.
    """

    def __init__(self, loader: Any, views: int, dtype: torch.dtype | None) -> None:
        self.loader, self.views, self.dtype = loader, views, dtype

    def take(self, table: Table, pairs: Array) -> tuple[Any, Any]:
        """Returns the recorded values and the labels of samples and seeds, (B, 2)."""
        rows = len(self.loader.dataset)
        tree, y = table.take(torch.from_numpy(pairs[:, 0] + rows * (pairs[:, 1] % self.views)))
        return samples.map_leaves(lambda leaf: converted(leaf, self.dtype), tree), y


class CachedBatches(EntryRows):
    """Returns batches of an entry in place of batches that are read.

    Args:
        loader: The loader whose data the entry holds.
        table: The activations and labels.
        cut: The cut that recorded them.
        views: Number of views of each sample.
        dtype: Type in which converted activations are used; None keeps the stored type.
    """

    def __init__(self, loader: Any, table: Table, cut: Cut, views: int, dtype: torch.dtype | None) -> None:
        super().__init__(loader, views, dtype)
        self.table, self.cut = table, cut

    def __call__(self, indices: Sequence[Any]) -> Any:
        """Returns the batch of these samples."""
        pairs = _pairs(indices)
        tree, y = self.take(self.table, pairs)
        x = CachedActivations(tree, self.cut, lambda count: self._read(pairs[:count]))
        return as_batch((x, y, *self.loader.dataset.known_of_all(pairs[:, 0])))

    def _read(self, pairs: Array) -> Any:
        return next(iter(self.loader.read([(row, seed) for row, seed in pairs.tolist()], len(pairs))))[0]


class TeacherOutputs(EntryRows):
    """Adds the teachers' outputs to a batch.

    Args:
        loader: The loader whose data the entries hold.
        tables: The teachers' outputs, by the method's name.
        views: Number of views of each sample.
        dtype: The model's type.
    """

    def __init__(self, loader: Any, tables: Mapping[str, Table], views: int, dtype: torch.dtype) -> None:
        super().__init__(loader, views, dtype)
        self.tables = tables

    def __call__(self, batch: Any, indices: Sequence[Any]) -> AnnotatedBatch:
        """Returns the batch with the teachers' outputs."""
        said = {name: self.take(table, _pairs(indices))[0] for name, table in self.tables.items()}
        return AnnotatedBatch(*batch)._replace(taught=said)


def _pairs(indices: Sequence[Any]) -> Array:
    """Returns samples and seeds, (B, 2) int64; a sample without a seed has 0."""
    return np.array([index if isinstance(index, tuple) else (index, 0) for index in indices], np.int64)


def view_seeds(view: int, views: int, domain: str, samples: int) -> list[int]:
    """Returns the seeds of one view of each sample, different between domains; the remainder encodes the view."""
    drawn = np.random.default_rng([view, zlib.crc32(domain.encode())]).integers(2**62 // views, size=samples)
    seeds: list[int] = (drawn * views + view).tolist()
    return seeds
