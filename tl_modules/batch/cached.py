"""What a batch holds in place of x where the frozen part of the backbone has been run before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

from tl_modules.batch import samples
from tl_modules.errors import UserError


class Replays(Protocol):
    """What made the activations, `cache.cut.Cut`."""

    backbone: Any
    plan: Any
    like: Any

    def replay(self, tree: Any) -> Any:
        """Gives the features of recorded activations."""

    def cache_now(self, x: Any) -> Any:
        """Gives inputs as if they had been cached; what does not fit stays as it is."""


class CachedActivations(samples.Node):
    """What the trainable part of the backbone reads of a batch.

    Args:
        tree: Recorded activations of B samples.
        cut: What recorded them and replays them.
        again: n -> the first n of the batch's raw inputs, read again.
    """

    def __init__(self, tree: Any, cut: Replays, again: Callable[[int], Any] | None = None) -> None:
        self.tree, self.cut, self.again = tree, cut, again
        self.kind = (id(cut.backbone), cut.plan)

    def replace(self, tree: Any) -> CachedActivations:
        """Returns other activations of the same cut."""
        return CachedActivations(tree, self.cut, self.again)

    def features(self) -> Any:
        """Runs what is trainable: the features of B samples."""
        return self.cut.replay(self.tree)

    def read(self, count: int) -> Any:
        """Reads the first raw inputs of the batch again."""
        assert self.again is not None
        return self.again(count)

    def to(self, device: Any, non_blocking: bool = True) -> CachedActivations:
        """Moves them to a device."""
        return self.replace(samples.move(self.tree, device, non_blocking=non_blocking))

    def __len__(self) -> int:
        return samples.count(self.tree)

    def __getattr__(self, name: str) -> NoReturn:
        """Tells whoever takes it for a tensor what to do."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise UserError(f"cache: x.{name} is asked for, but x was not read: its features are cached; let the method "
                        "say `needs_raw_input = True`, or pass --cache.enabled false")  # fmt: skip

    @classmethod
    def __torch_function__(cls, function: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """Tells the same to torch's functions."""
        raise UserError(f"cache: {function.__name__} is asked of x, but x was not read: its features are cached; let "
                        "the method say `needs_raw_input = True`, or pass --cache.enabled false")  # fmt: skip


def align_cached(xs: Sequence[Any]) -> list[Any]:
    """Brings the inputs of several domains to one cut, where some are cached, so that all pass as one batch."""
    cached = next((x for x in xs if isinstance(x, CachedActivations)), None)
    if cached is None or all(isinstance(x, CachedActivations) for x in xs):
        return list(xs)
    return [x if isinstance(x, CachedActivations) else _as(cached, cached.cut.cache_now(x)) for x in xs]


def pass_together(xs: Sequence[Any], align: Callable[[list[Any]], list[Any]]) -> bool:
    """Tells whether the inputs of several domains pass as one batch: they do if they would, had none been cached."""
    if not any(isinstance(x, CachedActivations) for x in xs):
        return samples.alike(xs)
    raw = [x.cut.like if isinstance(x, CachedActivations) else samples.take(x, slice(0, 1)) for x in xs]
    return samples.alike(xs) and samples.alike(align(raw))


def _as(cached: CachedActivations, x: Any) -> Any:
    """Casts to the types of what was stored in another precision."""
    if not isinstance(x, CachedActivations):
        return x

    def cast(new: Any, old: Any) -> Any:
        return new.to(old.values.dtype if isinstance(old, samples.Padded) else old.dtype)

    return samples.map_leaves(cast, x, cached)
