"""Operations on batches of samples: count, concat, split, take, move, alike, collate.

A batch is a tree. Its leaves are

    Tensor (B, ...)            a sample is an entry along the first axis
    Padded (B, ...), (B, k)    samples of unequal shapes, padded at their ends
    list                       one item per sample, e.g. strings
    None                       hidden, e.g. labels

and its nodes are dicts, tuples and `Node`s. Nothing else in the package depends on what is in a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Batch(NamedTuple):
    """A loader's batch of one domain.

    Attributes:
        x: The prepared inputs of B samples, a tree.
        y: Their labels, a tree, or None if they are hidden.
        index: The samples' numbers in their data set, (B,).
    """

    x: Any
    y: Any = None
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index


class AnnotatedBatch(NamedTuple):
    """A `Batch` with weights and teacher outputs.

    Attributes:
        x: As of a `Batch`.
        y: As of a `Batch`.
        index: As of a `Batch`.
        weight: How much each sample's loss counts, (B,), or None if the data has no weights.
        taught: The outputs of methods' teachers for the samples, a tree by the method's name.
    """

    x: Any
    y: Any
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index
    weight: Tensor | None = None
    taught: dict[str, Any] | None = None


def as_batch(part: Any) -> Any:
    """Makes a batch of a sequence (x, y, index) or (x, y, index, weight); a batch is returned as it is."""
    if isinstance(part, Batch | AnnotatedBatch):
        return part
    return Batch(*part) if len(part) < 4 else AnnotatedBatch(*part)


def weights_of(batches: Sequence[Any]) -> list[Tensor] | None:
    """Returns the weights of the samples of batches, 1 for a batch without weights; None if no batch has any."""
    found = [getattr(batch, "weight", None) for batch in batches]
    given = next((weight for weight in found if weight is not None), None)
    if given is None:
        return None
    pairs = zip(found, batches, strict=True)
    return [given.new_ones(count(batch.x)) if weight is None else weight for weight, batch in pairs]


@dataclass(eq=False)  # Lightning casts its fields to the run's precision
class Padded:
    """Samples of unequal shapes in one tensor.

    Args:
        values: (B, ...), padded beyond each sample's shape, with zeros or another value.
        shapes: The size of each sample along axes 1 to k, (B, k).
    """

    values: Tensor
    shapes: Tensor

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Padded:
        """Pads tensors with the same number of axes with zeros, to the largest of them."""
        shapes = torch.tensor([tensor.shape for tensor in tensors])
        values = tensors[0].new_zeros(len(tensors), *shapes.amax(0).tolist())
        for row, tensor in zip(values, tensors, strict=True):
            row[tuple(map(slice, tensor.shape))] = tensor
        return Padded(values, shapes)

    @property
    def lengths(self) -> Tensor:
        """Returns the size of each sample along axis 1, (B,)."""
        return self.shapes[:, 0]

    @property
    def mask(self) -> Tensor:
        """Returns True for samples and False for padding: (B, L), or (B, h, w) for maps; without a last axis D."""
        axes = min(self.shapes.shape[1], max(1, self.values.ndim - 2))
        inside = [
            (torch.arange(size, device=self.values.device) < self.shapes[:, axis, None]).view(
                -1, *(size if other == axis else 1 for other in range(axes))
            )
            for axis, size in enumerate(self.values.shape[1 : axes + 1])
        ]
        return reduce(torch.logical_and, inside)

    def replace(self, values: Tensor, lengths: Tensor | None = None) -> Padded:
        """Returns other values (B, L, ...) with the same lengths along axis 1, or with `lengths`."""
        return Padded(values, self.shapes[:, :1] if lengths is None else lengths[:, None])

    def tensors(self) -> list[Tensor]:
        """Returns the samples, each with its own shape."""
        return [row[tuple(map(slice, shape))] for row, shape in zip(self.values, self.shapes.tolist(), strict=True)]

    def to(self, *args: Any, **kwargs: Any) -> Padded:
        """Moves or casts the values, as `Tensor.to`; the shapes stay integers."""
        values = self.values.to(*args, **kwargs)
        return Padded(values, self.shapes.to(values.device, non_blocking=bool(kwargs.get("non_blocking"))))

    def pin_memory(self) -> Padded:
        """Copies the tensors to pinned memory."""
        return Padded(self.values.pin_memory(), self.shapes.pin_memory())

    def __len__(self) -> int:
        return len(self.values)


class Node(ABC):
    """An inner node that wraps a tree and adds meaning to it; the operations here pass through it."""

    tree: Any
    kind: Any = None  # must be equal for two nodes to be concatenated

    @abstractmethod
    def replace(self, tree: Any) -> Any:
        """Returns the same node with another tree."""


def map_leaves(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Builds the tree of the results of `function` on the leaves of `tree` and the corresponding leaves of the others.

    If one of the leaves is None, so is the result.

    Raises:
        TypeError: A leaf has a type that a batch cannot hold.
    """
    if tree is None or any(other is None for other in others):
        return None
    if isinstance(tree, Tensor | Padded | list):
        return function(tree, *others)
    if isinstance(tree, dict):
        return {key: map_leaves(function, value, *(other[key] for other in others)) for key, value in tree.items()}
    if isinstance(tree, tuple):
        parts = [map_leaves(function, *each) for each in zip(tree, *others, strict=True)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, Node):
        return tree.replace(map_leaves(function, tree.tree, *(other.tree for other in others)))
    raise TypeError(f"a batch holds tensors, Padded, lists, dicts and tuples, not a {type(tree).__name__}")


def leaves(tree: Any) -> list[Any]:
    """Lists the leaves from left to right; None is not one."""
    found: list[Any] = []
    map_leaves(found.append, tree)
    return found


def count(tree: Any) -> int:
    """Counts the samples.

    Raises:
        ValueError: The leaves have different numbers of samples, or there are no leaves.
    """
    if isinstance(tree, Tensor):
        return len(tree)
    sizes = {len(leaf) for leaf in leaves(tree)}
    if len(sizes) != 1:
        raise ValueError(f"the parts of a batch have {sorted(sizes)} samples")
    return sizes.pop()


def concat(trees: Sequence[Any]) -> Any:
    """Concatenates batches; returns None if one of them is None."""
    return trees[0] if len(trees) == 1 else map_leaves(_concat, *trees)


def _concat(*parts: Any) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], list):
        return [item for part in parts for item in part]
    largest = [max(sizes) for sizes in zip(*(part.values.shape[1:] for part in parts), strict=True)]
    return Padded(torch.cat([_fill(part.values, largest) for part in parts]), torch.cat([p.shapes for p in parts]))


def _fill(values: Tensor, largest: Sequence[int]) -> Tensor:
    missing = [full - size for full, size in zip(largest, values.shape[1:], strict=True)]
    return F.pad(values, [n for m in reversed(missing) for n in (0, m)]) if any(missing) else values


def split(tree: Any, sizes: Sequence[int]) -> list[Any]:
    """Divides a batch into consecutive batches of these sizes; None into as many None."""
    if len(sizes) == 1:
        return [tree]
    if isinstance(tree, Tensor):
        return list(torch.split(tree, list(sizes)))
    ends = np.cumsum(sizes).tolist()
    return [take(tree, slice(end - size, end)) for end, size in zip(ends, sizes, strict=True)]


def take(tree: Any, index: slice | Tensor) -> Any:
    """Takes the samples of a slice, of indices (n,) or of a mask (B,); Padded drops padding that none of them needs."""
    return map_leaves(lambda leaf: _take(leaf, index), tree)


def _take(leaf: Any, index: slice | Tensor) -> Any:
    if isinstance(leaf, list):
        return [leaf[i] for i in torch.arange(len(leaf))[index if isinstance(index, slice) else index.cpu()].tolist()]
    if isinstance(index, Tensor):
        index = index.to(leaf.device if isinstance(leaf, Tensor) else leaf.values.device)
    if isinstance(leaf, Tensor):
        return leaf[index]
    values, shapes = leaf.values[index], leaf.shapes[index]
    largest = shapes.amax(0).tolist() if len(shapes) else []
    within = (slice(None), *map(slice, largest))
    return Padded(values[within], shapes)


def unbind(tree: Any) -> list[Any]:
    """Divides a batch into batches of one sample, each of its natural shape."""
    return [take(tree, slice(i, i + 1)) for i in range(count(tree))]


def first(tree: Any) -> Any:
    """Returns the first sample alone, without the batch axis."""

    def one(leaf: Any) -> Any:
        return leaf.tensors()[0] if isinstance(leaf, Padded) else leaf[0]

    return map_leaves(one, tree)


def move(tree: Any, *args: Any, **kwargs: Any) -> Any:
    """Moves a batch to a device, with the arguments of `Tensor.to`; lists are left as they are."""
    return map_leaves(lambda leaf: leaf if isinstance(leaf, list) else leaf.to(*args, **kwargs), tree)


def copied(tree: Any) -> Any:
    """Copies the tensors."""

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, Padded):
            return Padded(leaf.values.clone(), leaf.shapes.clone())
        return leaf.clone() if isinstance(leaf, Tensor) else list(leaf)

    return map_leaves(copy, tree)


def to_float32(tree: Any) -> Any:
    """Casts half-precision tensors to float32."""

    def cast(leaf: Any) -> Any:
        values = leaf.values if isinstance(leaf, Padded) else leaf
        half = isinstance(values, Tensor) and values.dtype in (torch.float16, torch.bfloat16)
        return leaf.to(torch.float32) if half else leaf

    return map_leaves(cast, tree)


def alike(trees: Sequence[Any]) -> bool:
    """Returns whether batches can be concatenated."""
    return len({kind(tree) for tree in trees}) <= 1


def kind(tree: Any) -> Any:
    """Returns what must be equal for batches to be concatenated."""
    if isinstance(tree, Tensor):
        return tree.shape[1:], tree.dtype
    if isinstance(tree, Padded):
        return "padded", tree.values.ndim, tree.values.dtype, tree.shapes.shape[1]
    if isinstance(tree, dict):
        return frozenset((key, kind(value)) for key, value in tree.items())
    if isinstance(tree, tuple):
        return tuple(map(kind, tree))
    return (type(tree), tree.kind, kind(tree.tree)) if isinstance(tree, Node) else type(tree)


def describe(tree: Any) -> str:
    """Describes the shapes of a sample for messages."""
    shapes = [tuple((leaf.values if isinstance(leaf, Padded) else leaf).shape[1:]) for leaf in leaves(tree)
              if not isinstance(leaf, list)]  # fmt: skip
    return ", ".join(map(str, shapes))


def collate(samples: Sequence[Any]) -> Any:
    """Makes a batch of samples: numbers and equal-shaped tensors are stacked, other tensors padded, the rest listed."""
    first = samples[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {key: collate([sample[key] for sample in samples]) for key in first}
    if isinstance(first, tuple):
        parts = [collate(column) for column in zip(*samples, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    if isinstance(first, str):
        return list(samples)  # numpy strings too
    if isinstance(first, np.ndarray):
        return collate([torch.as_tensor(sample) for sample in samples])
    if isinstance(first, bool | int | float | np.generic):
        return torch.tensor(np.asarray(samples)) if isinstance(first, np.generic) else torch.tensor(list(samples))
    if isinstance(first, Tensor):
        return torch.stack(list(samples)) if len({s.shape for s in samples}) == 1 else Padded.of(samples)
    return list(samples)


class Collate:
    """Makes a batch of samples (x, y, index) or (x, y, index, weight) in a loader's worker; small, to be pickled.

    Args:
        prepare: The backbone's function from raw inputs to a tree.
        label: The task's function from raw labels to a tree.
    """

    def __init__(
        self, prepare: Callable[[Sequence[Any]], Any] = collate, label: Callable[[Sequence[Any]], Any] = collate
    ) -> None:
        self.prepare, self.label = prepare, label

    def __call__(self, samples: Sequence[tuple[Any, ...]]) -> Any:
        """Returns the batch; y is None if labels are hidden."""
        x, y, *known = zip(*samples, strict=True)
        return as_batch((self.prepare(x), None if y[0] is None else self.label(y), *map(torch.tensor, known)))
