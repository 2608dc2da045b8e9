"""What the network sees of a domain in one step, and how the inputs of several domains pass as one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tl_modules.batch import samples
from tl_modules.batch.cached import CachedActivations
from tl_modules.batch.samples import alike
from tl_modules.errors import UserError


@dataclass
class DomainView:
    """What the network sees of one domain in one step.

    Attributes:
        x: The raw input, (B, ...); where the frozen stages are cached, a `CachedActivations`.
        y: The labels, (B, ...), or None where they are hidden.
        features: (B, out_features).
        output: The head's output, (B, num_outputs).
        parts: How many rows each of several sources has, which follow one another; B of one domain.
        loss: The task's loss of each sample, (B,); None where the labels are hidden.
        weight: How much each sample's loss counts, (B,); None: all the same. Methods may put others in its place.
    """

    x: Tensor | CachedActivations
    y: Tensor | None
    features: Tensor
    output: Tensor
    parts: tuple[int, ...] = ()
    loss: Tensor | None = None
    weight: Tensor | None = None

    @property
    def mean_loss(self) -> Tensor:
        """The task's weighted mean loss, a scalar."""
        assert self.loss is not None
        return weighted_mean(self.loss, self.weight)

    def split(self) -> list[DomainView]:
        """A view for each of the domains."""
        if len(self.parts) < 2:
            return [self]
        sizes = list(self.parts)
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "parts"}
        columns: Any = {
            name: samples.split(c, sizes) if c is not None else [None] * len(sizes) for name, c in given.items()
        }
        return [DomainView(**{name: c[i] for name, c in columns.items()}) for i in range(len(sizes))]


def weighted_mean(loss: Tensor, weight: Tensor | None = None) -> Tensor:
    """`sum(weight loss) / sum(weight)` of losses (B,) and weights (B,) of the samples; without weights, their mean."""
    return loss.mean() if weight is None else (weight * loss).sum() / weight.sum()


def by_domain(given: Any, one: type) -> dict[str, Any]:
    """What belongs to each domain, of what somebody's own loaders give or are.

    Args:
        given: A mapping of domains as ours have it, or of one domain, the target, or a list of domains, the sources
            first and the target last.
        one: What a domain is, e.g. a DataLoader; or what a domain's batch (x, y) begins with, a Tensor.

    Returns:
        Keys are "source", or "source/0", "source/1", ... of several, and "target". A batch of one tensor has no labels.

    Raises:
        UserError: A name is none of these.
    """
    if isinstance(given, Mapping):
        domains = {name: part for name, part in given.items() if part is not None}
    elif not isinstance(given, list | tuple) or (one is Tensor and isinstance(given[0], one)):
        domains = {"target": given}
    else:
        sources = ["source"] if len(given) == 2 else [f"source/{number}" for number in range(len(given) - 1)]
        domains = dict(zip([*sources, "target"], given, strict=True))
    if wrong := [name for name in domains if name not in ("source", "target") and not str(name).startswith("source/")]:
        raise UserError(f"data: a domain is called {wrong[0]}; the names are target, and source or source/<name>")
    return {name: (part, None) if isinstance(part, Tensor) else part for name, part in domains.items()}


def joinable(xs: list[Tensor | CachedActivations]) -> list[Tensor | CachedActivations]:
    """The same inputs; beside others, grey images (B, 1, H, W) get three channels and bytes become floats in [0, 1]."""
    if any(isinstance(x, Tensor) and x.is_floating_point() for x in xs):
        xs = [x.float() / 255 if isinstance(x, Tensor) and x.dtype == torch.uint8 else x for x in xs]
    images = [x for x in xs if isinstance(x, Tensor) and x.ndim == 4]
    channels = max((x.shape[1] for x in images), default=1)
    if len(images) < len(xs) or {x.shape[1] for x in images} != {1, channels}:
        return xs
    return [x.expand(-1, channels, -1, -1) for x in images]


def check_sources(names: Sequence[str], xs: Sequence[Tensor | CachedActivations]) -> None:
    """Raises a UserError where the samples of several sources do not make one batch."""
    sources = {name: x for name, x in zip(names, xs, strict=True) if name.startswith("source")}
    if sources and not alike(list(sources.values())):
        shapes = ", ".join(f"{name} {tuple(x.shape[1:])}" for name, x in sources.items() if isinstance(x, Tensor))
        raise UserError(
            f"data: the sources' samples have unequal shapes ({shapes}); give all of them one, e.g. one size"
        )


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Inside, no BatchNorm of `module` moves its running statistics; in training it normalises by the batch as ever."""
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
