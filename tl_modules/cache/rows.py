"""Gives what entries hold of a loader's places, in place of a batch that is read or beside it."""

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


class Rows:
    """Takes what an entry has of places: row numbers, or row numbers with the seeds that choose a view.

    Args:
        loader: Whose data the entry holds.
        views: How many views of each sample there are.
        dtype: What converted numbers are computed with; None leaves them.
    """

    def __init__(self, loader: Any, views: int, dtype: torch.dtype | None) -> None:
        self.loader, self.views, self.dtype = loader, views, dtype

    def take(self, table: Table, pairs: Sequence[tuple[int, int]]) -> tuple[Any, Any]:
        """What was recorded, and the labels."""
        rows = len(self.loader.dataset)
        tree, y = table.take(torch.tensor([row + rows * (seed % self.views) for row, seed in pairs]))
        return samples.map_leaves(lambda leaf: converted(leaf, self.dtype), tree), y


class Memory(Rows):
    """Gives a batch of an entry in place of a batch that is read.

    Args:
        loader: Whose data the entry holds.
        table: The activations and labels.
        cut: What recorded them.
        views: How many views of each sample there are.
        dtype: What converted activations are computed with; None leaves them.
    """

    def __init__(self, loader: Any, table: Table, cut: Cut, views: int, dtype: torch.dtype | None) -> None:
        super().__init__(loader, views, dtype)
        self.table, self.cut = table, cut

    def __call__(self, places: Sequence[Any]) -> Any:
        """The batch at these places."""
        pairs = _pairs(places)
        tree, y = self.take(self.table, pairs)
        known = zip(*(self.loader.dataset.known_of(row) for row, _ in pairs), strict=True)
        x = CachedActivations(tree, self.cut, lambda count: self._read(pairs[:count]))
        return as_batch((x, y, *map(torch.tensor, known)))

    def _read(self, pairs: Sequence[tuple[int, int]]) -> Any:
        return next(iter(self.loader.read(pairs, len(pairs))))[0]


class Beside(Rows):
    """Adds to a batch what teachers say of its samples.

    Args:
        loader: Whose data the entries hold.
        tables: What is said, by the method's name.
        views: How many views of each sample there are.
        dtype: The model's.
    """

    def __init__(self, loader: Any, tables: Mapping[str, Table], views: int, dtype: torch.dtype) -> None:
        super().__init__(loader, views, dtype)
        self.tables = tables

    def __call__(self, batch: Any, places: Sequence[Any]) -> AnnotatedBatch:
        """The batch, and what is said."""
        said = {name: self.take(table, _pairs(places))[0] for name, table in self.tables.items()}
        return AnnotatedBatch(*batch)._replace(taught=said)


def _pairs(places: Sequence[Any]) -> list[tuple[int, int]]:
    return [place if isinstance(place, tuple) else (place, 0) for place in places]


def view_seeds(view: int, views: int, domain: str, samples: int) -> list[int]:
    """The seeds of one view of each sample, which differ between domains; the remainder says which view it is."""
    drawn = np.random.default_rng([view, zlib.crc32(domain.encode())]).integers(2**62 // views, size=samples)
    seeds: list[int] = (drawn * views + view).tolist()
    return seeds
