"""What a batch holds in place of x where the frozen part of the backbone has been run before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from tl_modules.batch import samples
from tl_modules.errors import UserError


class CachedActivations(samples.Node):
    """The activations of a batch where the closed stages end.

    Args:
        tree: The boundary.
        tail: The boundary -> features (B, out_features).
        read: n -> the first n of the batch's raw inputs, read again.
    """

    def __init__(self, tree: Any, tail: Callable[..., Any], read: Callable[[int], Any]) -> None:
        self.tree, self.tail, self.read, self.kind = tree, tail, read, id(tail)

    def replace(self, tree: Any) -> CachedActivations:
        """Returns the same around another tree."""
        return CachedActivations(tree, self.tail, self.read)

    def features(self) -> Any:
        """Returns the features."""
        return self.tail(*self.tree)

    def to(self, device: torch.device, non_blocking: bool = True) -> CachedActivations:
        """Moves to a device."""
        return self.replace(samples.move(self.tree, device, non_blocking=non_blocking))

    def __len__(self) -> int:
        return samples.count(self.tree)

    def __getattr__(self, name: str) -> NoReturn:
        """Whoever takes it for a tensor is told what to do."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise UserError(f"cache: x.{name} is asked for, but x was not read: its features are cached; let the method "
                        "say `reads_x = True`, or pass --cache.enabled false")  # fmt: skip

    @classmethod
    def __torch_function__(cls, function: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """The same for torch's functions."""
        raise UserError(f"cache: {function.__name__} is asked of x, but x was not read: its features are cached; let "
                        "the method say `reads_x = True`, or pass --cache.enabled false")  # fmt: skip


def align_cached(xs: list[Any]) -> list[Any]:
    """Returns them."""
    return xs
