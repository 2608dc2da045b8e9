"""Plans what is kept of a tensor that passes between modules, and what replaces it if it is not kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_modules.batch import samples
from tl_modules.batch.compat import pytree
from tl_modules.batch.samples import Padded

PLAIN = (type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device)

pytree.register_pytree_node(Padded, lambda p: ([p.values, p.shapes], None), lambda parts, _: Padded(*parts))


class CannotCut(Exception):
    """Raised if the frozen part cannot be cached at this cut; the message says why."""


@dataclass
class Leaf:
    """The plan for one leaf of x or of a call's output.

    Attributes:
        example: The leaf in the planning pass; if it is not a tensor, it is the same in each batch.
        needed: Whether its values are needed; otherwise a placeholder replaces it.
        shaped: Whether the placeholder must have its shape.
        solid: Whether the placeholder must have memory of its own, since the forward writes into it.
        per_sample: Whether it has one entry per sample.
        padded: Whether samples may have unequal shapes.
        channels_last: Whether it is stored as (B, H, W, C).
        written: Whether the forward writes into it.
    """

    example: Any
    needed: bool = True
    shaped: bool = False
    solid: bool = False
    per_sample: bool = False
    padded: bool = False
    channels_last: bool = False
    written: bool = False

    @staticmethod
    def of(example: Any, count: int, ragged: bool) -> Leaf:
        """Plans to keep an output for `count` samples, which may have unequal shapes.

        Raises:
            CannotCut: The output cannot be stored.
        """
        if not isinstance(example, Tensor):
            if not isinstance(example, PLAIN):
                raise CannotCut(
                    f"a frozen module returns a value that cannot be stored, of type {type(example).__name__}"
                )
            return Leaf(example, needed=False)
        last = example.is_contiguous(memory_format=torch.channels_last) if example.ndim == 4 else False
        own = example.ndim > 0 and len(example) == count
        padded, last = ragged and example.ndim > 1, last and not example.is_contiguous()
        return Leaf(example, per_sample=own, padded=padded, channels_last=last)

    @property
    def is_tensor(self) -> bool:
        """Whether the leaf is a tensor."""
        return isinstance(self.example, Tensor)

    @property
    def looked_at(self) -> bool:
        """Whether recording has to inspect the leaf, if only to check that it is the same for all samples."""
        return self.needed or self.shaped or not (self.is_tensor or self.example is None)

    @property
    def sized(self) -> bool:
        """Whether the leaf's shape is recorded with each sample."""
        return self.shaped and not self.needed and self.padded and self.per_sample

    @property
    def odd(self) -> bool:
        """Whether the leaf would have to be kept but has no entry per sample, e.g. a position bias."""
        return self.is_tensor and not self.per_sample and (self.needed or (self.shaped and self.padded))

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's shape in the plan; of one sample if it has one entry per sample."""
        return tuple(self.example.shape[self.per_sample :])

    def plan(self) -> Any:
        """The leaf described as plain data, without values; a shape that is only read is not part of what is kept."""
        if not self.is_tensor:
            return repr(self.example)
        shape = self.shape if self.needed and not self.padded else None
        return self.needed, self.shaped, self.solid, self.per_sample, self.padded, self.channels_last, shape

    def placeholder(self, shape: Sequence[int], fill: int = 0) -> Tensor:
        """Makes a tensor that shows up as NaN if it is read after all; integers are `fill`."""
        if not self.shaped:
            return filled(self.example, (), fill)
        return filled(self.example, shape, fill) if self.solid else filled(self.example, (), fill).expand(tuple(shape))

    def shown(self, fill: int = 0) -> Any:
        """Returns the value that a trial of the plan uses."""
        if not self.is_tensor:
            return self.example
        return self.example.clone() if self.needed else self.placeholder(self.example.shape, fill)

    def check(self, leaf: Any, count: int) -> None:
        """Compares the plan with the output for other samples.

        Raises:
            CannotCut: The output is not of the planned kind.
        """
        if not self.is_tensor:
            if leaf != self.example:
                raise CannotCut(f"a frozen module returns {self.example} for some samples and {leaf} for others")
            return
        if not self.looked_at:
            return
        own = not self.per_sample or (leaf.ndim > 0 and len(leaf) == count)
        free = self.padded and self.per_sample
        if (
            not own
            or leaf.ndim != self.example.ndim
            or (not free and tuple(leaf.shape[self.per_sample :]) != self.shape)
        ):
            raise CannotCut(
                f"a frozen module returns {tuple(leaf.shape)} for {count} samples, not one of the same shape for each"
            )


def filled(like: Tensor, shape: Sequence[int], fill: int = 0) -> Tensor:
    """Makes a tensor of NaN, or of `fill` if the type has no NaN."""
    value = float("nan") if like.is_floating_point() or like.is_complex() else fill
    return torch.full(tuple(shape), value, dtype=like.dtype, device=like.device)


def tensors(tree: Any) -> list[Tensor]:
    """Lists the tensors in a tree of any kind."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def device_of(tree: Any) -> torch.device:
    """Returns the device of a tree's first tensor."""
    return next((leaf.device for leaf in tensors(tree)), torch.device("cpu"))


def equal(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Returns whether the leaves that a module has returned twice are equal up to rounding."""
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5) if isinstance(a, Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def difference(given: Any, whole: Any) -> float:
    """Returns the largest difference of features, relative to each leaf's largest value; inf for other shapes.

    Padding is ignored.
    """
    worst = 0.0
    for one, other in zip(samples.unbind(given), samples.unbind(whole), strict=True):
        for a, b in zip(tensors(one), tensors(other), strict=True):
            if a.shape != b.shape or not bool(a.isfinite().all()):
                return float("inf")
            if a.numel():
                a, b = a.double(), b.double()
                worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)))
    return worst


def tolerance(features: Any) -> float:
    """Returns the largest difference due to another order of summation; GPUs round products to 10 bits."""
    half = any(leaf.dtype in (torch.float16, torch.bfloat16) for leaf in tensors(features))
    return 1e-2 if half else 2e-3 if device_of(features).type == "cuda" else 1e-4
