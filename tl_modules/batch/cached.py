"""Cached activations, which take the place of x in a batch if the frozen part of the backbone has already run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

from tl_modules.batch import samples
from tl_modules.errors import UserError


class Replayer(Protocol):
    """The object that recorded the activations: `cache.cut.Cut`."""

    backbone: Any
    plan: Any
    like: Any

    def replay(self, tree: Any) -> Any:
        """Returns the features that follow from recorded activations."""

    def cache_now(self, x: Any) -> Any:
        """Records the activations of inputs now, as if they had been cached; returns unsuitable inputs unchanged."""


class CachedActivations(samples.Node):
    """The activations from which the trainable part of the backbone continues.

    Args:
        tree: Recorded activations of B samples.
        cut: The cut that recorded them and replays them.
        again: Function of n that reads the first n raw inputs of the batch again.
    """

    def __init__(self, tree: Any, cut: Replayer, again: Callable[[int], Any] | None = None) -> None:
        self.tree, self.cut, self.again = tree, cut, again
        self.kind = (id(cut.backbone), cut.plan)

    def replace(self, tree: Any) -> CachedActivations:
        """Returns other activations with the same cut."""
        return CachedActivations(tree, self.cut, self.again)

    def features(self) -> Any:
        """Runs the trainable part and returns the features of B samples."""
        return self.cut.replay(self.tree)

    def read(self, count: int) -> Any:
        """Reads the first `count` raw inputs of the batch again."""
        assert self.again is not None
        return self.again(count)

    def to(self, device: Any, non_blocking: bool = True) -> CachedActivations:
        """Moves the activations to a device."""
        return self.replace(samples.move(self.tree, device, non_blocking=non_blocking))

    def __len__(self) -> int:
        return samples.count(self.tree)

    def __getattr__(self, name: str) -> NoReturn:
        """Raises an error that explains the cache to code that uses x as a tensor."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise UserError(f"cache: x.{name} is not available: x was not read, its features are cached; set "
                        "`needs_raw_input = True` in the method, or pass --cache.enabled false")  # fmt: skip

    @classmethod
    def __torch_function__(cls, function: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises the same error for torch functions."""
        raise UserError(f"cache: {function.__name__} cannot use x: x was not read, its features are cached; set "
                        "`needs_raw_input = True` in the method, or pass --cache.enabled false")  # fmt: skip


def align_cached(xs: Sequence[Any]) -> list[Any]:
    """Brings the inputs of several domains to one cut if some are cached, so that all can pass as one batch."""
    cached = next((x for x in xs if isinstance(x, CachedActivations)), None)
    if cached is None or all(isinstance(x, CachedActivations) for x in xs):
        return list(xs)
    return [x if isinstance(x, CachedActivations) else _as(cached, cached.cut.cache_now(x)) for x in xs]


def pass_together(xs: Sequence[Any], align: Callable[[list[Any]], list[Any]]) -> bool:
    """Returns whether the inputs of several domains form one batch: exactly if they would without the cache."""
    if not any(isinstance(x, CachedActivations) for x in xs):
        return samples.alike(xs)
    raw = [x.cut.like if isinstance(x, CachedActivations) else samples.take(x, slice(0, 1)) for x in xs]
    return samples.alike(xs) and samples.alike(align(raw))


def _as(cached: CachedActivations, x: Any) -> Any:
    """Casts x to the dtypes of the stored activations, which may have another precision."""
    if not isinstance(x, CachedActivations):
        return x

    def cast(new: Any, old: Any) -> Any:
        return new.to(old.values.dtype if isinstance(old, samples.Padded) else old.dtype)

    return samples.map_leaves(cast, x, cached)
