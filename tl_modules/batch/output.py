"""The network's output for one domain in one step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from tl_modules.batch import samples
from tl_modules.batch.compat import BatchNorm
from tl_modules.batch.samples import Batch
from tl_modules.errors import UserError


@dataclass
class DomainOutput:
    """The outputs for one domain's batch of B samples; expensive ones are computed on first access.

    Attributes:
        module: The module, whose task defines loss, prediction and probabilities.
        x: The prepared inputs, a tree; a `CachedActivations` if the frozen stages are cached.
        y: The labels, a tree, or None if they are hidden.
        features: The head's input, a tree; (B, out_features) if the task uses pooled features.
        output: The head's output, a tree, e.g. (B, num_outputs).
        index: The samples' numbers in their data set, (B,).
        parts: The number of samples of each of several domains, which are concatenated.
        labelled: An output of the labelled samples alone, if the target has labelled and unlabelled ones; else None.
        given_weight: How much the loss of each sample counts according to the data, (B,), or None.
        taught: The outputs of methods' teachers for the samples, a tree by the method's name, or None.
    """

    module: Any = field(repr=False)  # a BaseTransferModule; its file imports this one
    x: Any
    y: Any
    features: Any
    output: Any
    index: Tensor | None = None
    parts: tuple[int, ...] = ()
    labelled: DomainOutput | None = None
    given_weight: Tensor | None = None
    taught: Any = None

    @property
    def with_labels(self) -> DomainOutput | None:
        """Returns the labelled part: self or `labelled`; None if there is none."""
        return self if self.y is not None else self.labelled

    @cached_property
    def pooled(self) -> Tensor:
        """Returns one feature vector per sample, (B, D)."""
        if self.module.uses_pooled_features:
            return cast(Tensor, self.features)
        return cast(Tensor, self.module.backbone.pooled_features(self.features))

    @cached_property
    def probabilities(self) -> Tensor:
        """Returns the class probabilities, (B, C)."""
        return cast(Tensor, self.module.probabilities(self))

    @cached_property
    def prediction(self) -> Any:
        """Returns each sample's prediction as a user wants it, a tree."""
        return self.module.postprocess(self)

    @cached_property
    def loss(self) -> Tensor:
        """Returns the task's loss of each sample, (B,).

        Raises:
            UserError: The task returns another shape.
        """
        return self._per_sample("loss", self.module.loss(self))

    @cached_property
    def weight(self) -> Tensor | None:
        """Returns how much each sample's loss counts, (B,); None: equally. Methods may replace it."""
        weight, given = self.module.loss_weight(self), self.given_weight
        if weight is None:
            return given
        return self._per_sample("loss_weight", weight) * (1.0 if given is None else given)

    @property
    def mean_loss(self) -> Tensor:
        """Returns the task's weighted mean loss, a scalar."""
        return weighted_mean(self.loss, self.weight)

    def _per_sample(self, name: str, given: Tensor) -> Tensor:
        if given.shape != (len(self),):
            raise UserError(
                f"{type(self.module).__name__}.{name} returns a tensor of shape {tuple(given.shape)} for {len(self)} "
                'samples; it must return one value for each, (B,), e.g. with reduction="none"'
            )
        return given

    def split(self) -> list[DomainOutput]:
        """Returns one output per domain."""
        if len(self.parts) < 2:
            return [self]
        ends = list(accumulate(self.parts))
        return [self.take(slice(end - size, end)) for size, end in zip(self.parts, ends, strict=True)]

    def take(self, index: slice) -> DomainOutput:
        """Returns the output for some of the samples, with the weights that methods have set."""
        trees = (self.x, self.y, self.features, self.output, self.index)
        found = DomainOutput(self.module, *(samples.take(tree, index) for tree in trees))
        found.given_weight, found.taught = (samples.take(tree, index) for tree in (self.given_weight, self.taught))
        if "loss" in vars(self):
            found.loss = self.loss[index]
        if self.y is not None:
            found.weight = None if self.weight is None else self.weight[index]
        return found

    def __len__(self) -> int:
        return samples.count(self.features)


def weighted_mean(loss: Tensor, weight: Tensor | None = None) -> Tensor:
    """Computes `sum(weight loss) / sum(weight)` of losses (B,) and weights (B,); without weights, the mean.

    The sums are over one process and one batch, as in torch's `CrossEntropyLoss(weight=...)`: DDP and gradient
    accumulation take the plain mean of these means, whatever their sums of weights.
    """
    if weight is None:
        return loss.mean()
    return (weight * loss).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)  # all weights may be 0


def joined(module: Any, owner: str, batches: Sequence[Batch], features: Any, output: Any) -> DomainOutput:
    """Concatenates the batches of one domain: several sources, or the labelled and the unlabelled part of a target.

    Args:
        module: The module.
        owner: "source" or "target".
        batches: Their inputs and labels.
        features: Features of all of them, concatenated.
        output: The head's outputs, concatenated.
    """
    xs, ys, index = zip(*(batch[:3] for batch in batches), strict=True)
    # sources may have samples of unequal shapes, which matters only to methods that read them
    x = samples.concat(xs) if samples.alike(xs) else None
    sizes = tuple(map(samples.count, xs))
    found = DomainOutput(module, x, samples.concat(ys), features, output, samples.concat(index), sizes)
    found.taught = samples.concat([getattr(batch, "taught", None) for batch in batches])
    weights = samples.weights_of(batches)
    found.given_weight = None if weights is None else torch.cat(weights)
    if owner == "target" and len(batches) > 1:  # a labelled and an unlabelled part, which are not domains of their own
        for part, batch in zip(found.split(), batches, strict=True):
            if batch.y is not None:
                part.x, part.y = batch.x, batch.y
                found.labelled = part
        found.parts = (sum(sizes),)
    return found


def by_domain(given: Any, one: type) -> dict[str, Any]:
    """Assigns what foreign loaders are or return to the domains.

    given: A mapping with our domain names, or one domain, the target, or a list of domains, the sources first and the
        target last.
            first and the target last.
        one: The type of a domain, e.g. DataLoader; or of the first element of a domain's batch (x, y), Tensor.

    Returns:
        Keys are "source", or "source/0", "source/1", ... if there are several, and "target". Batches become `Batch`es;
        a batch of one tensor has no labels.

    Raises:
        UserError: A name is not one of these.
    """
    if isinstance(given, Mapping):
        domains = {name: part for name, part in given.items() if part is not None}
    elif not isinstance(given, list | tuple) or isinstance(given, Batch) or (one is Tensor and _is_batch(given)):
        domains = {"target": given}
    else:
        sources = ["source"] if len(given) == 2 else [f"source/{number}" for number in range(len(given) - 1)]
        domains = dict(zip([*sources, "target"], given, strict=True))
    if wrong := [name for name in domains if not _is_name(str(name))]:
        raise UserError(f"data: unknown domain {wrong[0]}; the names are target, and source or source/<name>")
    return domains if one is not Tensor else {name: _as_batch(part) for name, part in domains.items()}


def _is_name(name: str) -> bool:
    return name in ("source", "target", "target/labelled") or name.startswith("source/")


def _is_batch(given: Any) -> bool:
    return isinstance(given[0], Tensor | samples.Padded | dict | samples.Node)


def _as_batch(part: Any) -> Any:
    return samples.as_batch(part) if isinstance(part, list | tuple) else Batch(part)


def check_sources(names: Sequence[str], xs: Sequence[Any]) -> None:
    """Raises a UserError if the samples of several sources do not make one batch."""
    sources = {name: x for name, x in zip(names, xs, strict=True) if name.startswith("source")}
    if not samples.alike(list(sources.values())):
        kinds = ", ".join(f"{name} {samples.describe(x)}" for name, x in sources.items())
        raise UserError(
            f"data: the sources' samples have unequal shapes ({kinds}); bring them to one shape, e.g. one image size"
        )


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Disables mixed precision: heads, losses and methods run in float32."""
    mixed = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if mixed else nullcontext()


@contextmanager
def no_stats_update(module: nn.Module) -> Iterator[None]:
    """Keeps the running statistics of `module`'s BatchNorms; in training they still normalise by batch statistics."""
    layers = [m for m in module.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
