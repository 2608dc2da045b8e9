"""What a batch holds in place of x where the frozen part of the backbone has been run before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from tl_modules.errors import UserError


class Cached:
    """The activations of a batch where the closed stages end.

    Args:
        boundary: Tensors of B rows each.
        tail: The boundary -> features (B, out_features).
        read: How many -> so many of the batch's raw inputs, read anew.
    """

    def __init__(
        self, boundary: tuple[Tensor, ...], tail: Callable[..., Tensor], read: Callable[[int], Tensor]
    ) -> None:
        self.boundary, self.tail, self.read = boundary, tail, read

    def features(self) -> Tensor:
        """Features (B, out_features)."""
        return self.tail(*self.boundary)

    def kind(self) -> tuple[Any, ...]:
        """What two of them must have in common to be joined."""
        return (self.tail, *((part.shape[1:], part.dtype) for part in self.boundary))

    @staticmethod
    def join(parts: Sequence[Cached]) -> Cached:
        """One after the other."""
        boundary = tuple(torch.cat(columns) for columns in zip(*(part.boundary for part in parts), strict=True))
        return Cached(boundary, parts[0].tail, parts[0].read)

    def split(self, sizes: list[int]) -> list[Cached]:
        """Parts of so many rows each."""
        rows = zip(*(torch.split(part, sizes) for part in self.boundary), strict=True)
        return [Cached(boundary, self.tail, self.read) for boundary in rows]

    def to(self, device: torch.device, non_blocking: bool = True) -> Cached:
        """The same on a device."""
        moved = tuple(part.to(device, non_blocking=non_blocking) for part in self.boundary)
        return Cached(moved, self.tail, self.read)

    def __len__(self) -> int:
        return len(self.boundary[0])

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
