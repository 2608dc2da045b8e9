"""Methods that change how features are normalised, inside the backbone; they have no term."""

from __future__ import annotations

import copy
from itertools import groupby
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

from tl_modules.batch.compat import BatchNorm
from tl_modules.batch.current_domain import domain_rows
from tl_modules.batch.output import DomainOutput
from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.errors import UserError
from tl_modules.methods.base import Method, check_trains

__all__ = ["DomainBatchNorm", "StochNorm"]


class BatchNormPatch(Method):
    """Gives every BatchNorm layer of the backbone another class, so that its weights keep their names.

    A subclass writes `change`.
    """

    changes_backbone = True

    def attach(self, module: BaseTransferModule) -> None:
        """Changes the layers.

        Raises:
            UserError: There are none, or another method has changed them.
        """
        layers = [layer for layer in module.backbone.modules() if isinstance(layer, BatchNorm)]
        name = type(self).__name__
        if not layers:
            raise UserError(f"methods: {name} changes BatchNorm layers, and the backbone has none")
        for layer in layers:
            if hasattr(layer, "changed_by"):
                raise UserError(f"methods: {name} and {layer.changed_by} both change the BatchNorm layers; take one")
            self.change(layer)
            cast(Any, layer).changed_by = name

    def change(self, layer: BatchNorm) -> None:
        """Changes one layer in place."""
        raise NotImplementedError

    def check(self, module: BaseTransferModule, domains: list[str]) -> None:
        """Also refuses a run in which none of the layers ever trains.

        Raises:
            UserError: All are closed for good, or keep their statistics.
        """
        super().check(module, domains)
        layers = [layer for layer in module.backbone.modules() if hasattr(layer, "changed_by")]
        check_trains(self, module, layers, "BatchNorm layers")
        if module.finetuning.batch_norm == "eval":
            raise UserError(
                f"batch_norm: eval keeps the layers that {type(self).__name__} changes at rest; leave it out"
            )

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> None:
        """No term."""


class DomainBatchNorm(BatchNormPatch):
    """DSBN: statistics and affine parameters for each of source and target (Chang et al., CVPR 2019).

    The source's are added; the layer's own become the target's, with which the model predicts.
    """

    required_domains = ("source", "target")
    needs_raw_input = True  # a cached entry does not know which domain it was normalised for
    supported_settings = ("several sources", "partial", "open set")

    def change(self, layer: BatchNorm) -> None:
        """Adds the source's twin."""
        layer.source = copy.deepcopy(layer)
        patch_class(layer, _ByDomain)


class _ByDomain(BatchNorm):
    source: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        # neighbours of one domain, e.g. several sources, together; where nobody says, all are the target's
        groups = groupby(domain_rows() or [("target", len(input))], key=itemgetter(0))
        runs = [(name, sum(count for _, count in group)) for name, group in groups]
        parts = []
        for (name, _), part in zip(runs, torch.split(input, [count for _, count in runs]), strict=True):
            parts.append(super().forward(part) if name == "target" else self.source(part))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class StochNorm(BatchNormPatch):
    """Stochastic normalisation (Kou et al., NeurIPS 2020).

    In training each channel takes, with probability p, the running statistics in place of the batch's.

    Args:
        p: The probability; the paper takes 0.5.
    """

    supported_settings = ("several sources", "generalisation", "partial", "open set", "source-free")

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def change(self, layer: BatchNorm) -> None:
        """Sets its probability; a layer without weights only standardises."""
        if not layer.affine:
            return
        patch_class(layer, _Stochastic)
        cast(Any, layer).p = self.p


class _Stochastic(BatchNorm):
    p: float

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.running_mean is None or self.running_var is None:
            return super().forward(input)
        shape = (1, -1, *(1,) * (input.ndim - 2))
        # before this batch moves them
        mean, deviation = self.running_mean.clone(), (self.running_var + self.eps).sqrt()
        fixed = (input - mean.view(shape)) / deviation.view(shape)
        if self.affine:
            fixed = fixed * self.weight.view(shape) + self.bias.view(shape)
        chosen = torch.rand(len(mean), device=input.device).view(shape) < self.p
        return torch.where(chosen, fixed, super().forward(input))


def patch_class(layer: BatchNorm, mixin: type[BatchNorm]) -> None:
    """Gives a layer, whatever its number of dimensions, the forward of `mixin`."""
    layer.__class__ = type(mixin.__name__, (mixin, type(layer)), {"__module__": __name__})
