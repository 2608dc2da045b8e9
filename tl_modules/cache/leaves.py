"""Plans what is kept of a tensor that passes between modules, and what stands in its place otherwise."""

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
    """What is frozen cannot be cached here; its text says why."""


@dataclass
class Leaf:
    """What is planned for one leaf of x or of a call's output.

    Attributes:
        example: As it was in the plan; what is no tensor is the same in each batch.
        needed: Whether its values are; else a placeholder stands for it.
        shaped: Whether the placeholder must have its shape.
        solid: Whether the placeholder must have memory of its own, since the forward writes into it.
        per_sample: Whether it has an entry for each sample.
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
        """Plans to keep what was returned for so many samples, which may be of unequal shapes.

        Raises:
            CannotCut: It cannot be stored.
        """
        if not isinstance(example, Tensor):
            if not isinstance(example, PLAIN):
                raise CannotCut(
                    f"a frozen module returns what cannot be stored, a value of type {type(example).__name__}"
                )
            return Leaf(example, needed=False)
        last = example.is_contiguous(memory_format=torch.channels_last) if example.ndim == 4 else False
        own = example.ndim > 0 and len(example) == count
        padded, last = ragged and example.ndim > 1, last and not example.is_contiguous()
        return Leaf(example, per_sample=own, padded=padded, channels_last=last)

    @property
    def is_tensor(self) -> bool:
        """Tells whether it is one."""
        return isinstance(self.example, Tensor)

    @property
    def looked_at(self) -> bool:
        """Tells whether recording has to look at it, were it only that it is the same for all."""
        return self.needed or self.shaped or not (self.is_tensor or self.example is None)

    @property
    def sized(self) -> bool:
        """Tells whether its shape is recorded with each sample."""
        return self.shaped and not self.needed and self.padded and self.per_sample

    @property
    def odd(self) -> bool:
        """Tells whether it would have to be kept and is not an entry per sample, e.g. a position bias."""
        return self.is_tensor and not self.per_sample and (self.needed or (self.shaped and self.padded))

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns its shape in the plan, of a sample if it has an entry for each."""
        return tuple(self.example.shape[self.per_sample :])

    def plan(self) -> Any:
        """Describes it as plain data, without values; a shape that is only read is no part of what is kept."""
        if not self.is_tensor:
            return repr(self.example)
        shape = self.shape if self.needed and not self.padded else None
        return self.needed, self.shaped, self.solid, self.per_sample, self.padded, self.channels_last, shape

    def placeholder(self, shape: Sequence[int], fill: int = 0) -> Tensor:
        """Makes what shows itself as NaN wherever it is read after all; whole numbers are `fill`."""
        if not self.shaped:
            return filled(self.example, (), fill)
        return filled(self.example, shape, fill) if self.solid else filled(self.example, (), fill).expand(tuple(shape))

    def shown(self, fill: int = 0) -> Any:
        """Returns what a trial of the plan sees."""
        if not self.is_tensor:
            return self.example
        return self.example.clone() if self.needed else self.placeholder(self.example.shape, fill)

    def check(self, leaf: Any, count: int) -> None:
        """Compares with what is returned for other samples.

        Raises:
            CannotCut: It is not of the kind that was planned.
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
                f"a frozen module returns {tuple(leaf.shape)} for {count} samples, not one entry of one shape for each"
            )


def filled(like: Tensor, shape: Sequence[int], fill: int = 0) -> Tensor:
    """Makes NaN, or where there is none `fill`, of a tensor's type."""
    value = float("nan") if like.is_floating_point() or like.is_complex() else fill
    return torch.full(tuple(shape), value, dtype=like.dtype, device=like.device)


def tensors(tree: Any) -> list[Tensor]:
    """Lists the tensors in a tree of any kind."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def device_of(tree: Any) -> torch.device:
    """Returns where a tree's first tensor is."""
    return next((leaf.device for leaf in tensors(tree)), torch.device("cpu"))


def equal(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Tells whether the leaves that a module has returned twice are the same, but for rounding."""
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5) if isinstance(a, Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def difference(given: Any, whole: Any) -> float:
    """Returns the largest difference of features, relative to each leaf's largest value; inf for other shapes.

    Only what a sample has of its own counts, not what fills it up.
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
    """Returns the difference that sums in another order make; GPUs round products to 10 bits."""
    half = any(leaf.dtype in (torch.float16, torch.bfloat16) for leaf in tensors(features))
    return 1e-2 if half else 2e-3 if device_of(features).type == "cuda" else 1e-4
