"""Stores the leaves of all samples' trees, accessed by sample number.

Uniform   values (N, ...)                                 a sample is an entry along the first axis
Ragged    values (total,), starts (N,), shapes (N, k)     samples of unequal shapes, concatenated
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tl_modules.batch import samples
from tl_modules.batch.samples import Padded
from tl_modules.cache.store import Checksums


class Uniform:
    """Samples of one shape.

    Args:
        values: (N, ...), e.g. memory-mapped.
        checksums: Of the values, if some still have to be verified.
    """

    def __init__(self, values: Tensor, checksums: Checksums | None = None) -> None:
        self.values, self.checksums = values, checksums
        self.row = values[:1].nbytes

    def take(self, index: Tensor, axes: int = 0) -> Tensor:
        """Takes the samples with these numbers."""
        if self.checksums:
            self.checksums.require(index * self.row, (index + 1) * self.row)
        return self.values.index_select(0, index)

    @property
    def nbytes(self) -> int:
        """Returns the size in bytes."""
        return self.values.nbytes


class Ragged:
    """Samples of unequal shapes with the same number of axes.

    Args:
        values: (total,), e.g. memory-mapped.
        starts: Where each sample starts in `values`, (N,).
        shapes: The shape of each sample, (N, k).
        checksums: Of the values, if some still have to be verified.
    """

    def __init__(self, values: Tensor, starts: Tensor, shapes: Tensor, checksums: Checksums | None = None) -> None:
        self.values, self.starts, self.shapes, self.checksums = values, starts, shapes, checksums
        # if only the first axis differs, as over time or tokens, an entry is one step along it
        self.tail = shapes[0, 1:].tolist() if len(shapes) and bool((shapes[:, 1:] == shapes[0, 1:]).all()) else None
        self.step = max(1, int(shapes[0, 1:].prod())) if self.tail is not None else 0

    def take(self, index: Tensor, axes: int = 0) -> Padded:
        """Takes the samples with these numbers, and their shapes along the first `axes` axes; 0 means all axes."""
        shapes = self.shapes[index]
        size, given = shapes.amax(0).tolist(), shapes[:, :axes] if axes else shapes
        if self.checksums:
            starts, width = self.starts[index], self.values.itemsize
            self.checksums.require(starts * width, (starts + shapes.prod(1)) * width)
        if self.tail is not None and self.values.numel():
            steps = torch.arange(size[0])
            beyond = steps >= shapes[:, :1]
            positions = (self.starts[index, None] // self.step + steps).masked_fill_(beyond, 0)
            values = self.values.view(-1, *self.tail).index_select(0, positions.view(-1)).view(len(index), *size)
            return Padded(values.masked_fill_(beyond.view(*beyond.shape, *[1] * len(self.tail)), 0), given)
        values = self.values.new_zeros(len(index), *size)
        for row, start, shape in zip(values, self.starts[index].tolist(), shapes, strict=True):
            natural = self.values[start : start + int(shape.prod())].view(shape.tolist())
            row[tuple(map(slice, natural.shape))] = natural
        return Padded(values, given)

    @property
    def nbytes(self) -> int:
        """Returns the size in bytes."""
        return self.values.nbytes + self.starts.nbytes + self.shapes.nbytes


Column = Uniform | Ragged


class Table:
    """The columns of the trees of N samples.

    Args:
        columns: One for each leaf.
        template: The tree of some samples.
    """

    def __init__(self, columns: Sequence[Column], template: Any) -> None:
        self.columns, self.template = list(columns), template

    def take(self, index: Tensor) -> Any:
        """Takes the tree of the samples with these numbers."""
        columns = iter(self.columns)

        def leaf(like: Any) -> Any:
            return next(columns).take(index, like.shapes.shape[1] if isinstance(like, Padded) else 0)

        return samples.map_leaves(leaf, self.template)

    @property
    def nbytes(self) -> int:
        """Returns the size in bytes."""
        return sum(column.nbytes for column in self.columns)
