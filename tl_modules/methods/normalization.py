"""Methods that change the normalisation layers of the backbone; they have no term."""

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

__all__ = ["DSBN", "StochNorm"]


class BatchNormPatch(Method):
    """Changes the class of every BatchNorm layer of the backbone, so that the names of weights stay the same.

    A subclass implements `change`.
    """

    changes_backbone = True

    def attach(self, module: BaseTransferModule) -> None:
        """Patches the layers.

        Raises:
            UserError: There are none, or another method has patched them.
        """
        layers = [layer for layer in module.backbone.modules() if isinstance(layer, BatchNorm)]
        name = type(self).__name__
        if not layers:
            raise UserError(f"methods: {name} changes BatchNorm layers, but the backbone has none")
        for layer in layers:
            if hasattr(layer, "changed_by"):
                raise UserError(f"methods: {name} and {layer.changed_by} both change the BatchNorm layers; use one")
            self.change(layer)
            cast(Any, layer).changed_by = name

    def change(self, layer: BatchNorm) -> None:
        """Patches one layer in place."""
        raise NotImplementedError

    def check(self, module: BaseTransferModule, domains: list[str]) -> None:
        """Also rejects a run in which none of the layers ever trains.

        Raises:
            UserError: All layers are frozen for the whole run, or keep their statistics.
        """
        super().check(module, domains)
        layers = [layer for layer in module.backbone.modules() if hasattr(layer, "changed_by")]
        check_trains(self, module, layers, "BatchNorm layers")
        if module.finetuning.batch_norm == "eval":
            raise UserError(f"batch_norm: eval disables the layers that {type(self).__name__} changes; leave it out")

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> None:
        """Returns no term."""


class DSBN(BatchNormPatch):
    """Domain-specific batch normalization (Chang et al., CVPR 2019).

    Source and target have separate statistics and affine parameters. The source's are new; the layer's own become the
    target's, which are used for prediction.
    """

    required_domains = ("source", "target")
    needs_raw_input = True  # the cache does not record which domain a sample was normalised for
    supported_settings = ("several sources", "partial", "open set")

    def change(self, layer: BatchNorm) -> None:
        """Adds the source's layer."""
        layer.source = copy.deepcopy(layer)
        patch_class(layer, _ByDomain)


class _ByDomain(BatchNorm):
    source: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        # adjacent rows of one domain, e.g. several sources, together; undeclared rows are the target's
        groups = groupby(domain_rows() or [("target", len(input))], key=itemgetter(0))
        runs = [(name, sum(count for _, count in group)) for name, group in groups]
        parts = []
        for (name, _), part in zip(runs, torch.split(input, [count for _, count in runs]), strict=True):
            parts.append(super().forward(part) if name == "target" else self.source(part))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class StochNorm(BatchNormPatch):
    """Stochastic normalisation (Kou et al., NeurIPS 2020).

    In training each channel uses, with probability p, the running statistics instead of the batch's.

    Args:
        p: The probability; 0.5 in the paper.
    """

    supported_settings = ("several sources", "generalisation", "partial", "open set", "source-free")

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def change(self, layer: BatchNorm) -> None:
        """Sets the layer's probability; a layer without weights only standardises."""
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
        # before this batch updates them
        mean, deviation = self.running_mean.clone(), (self.running_var + self.eps).sqrt()
        fixed = (input - mean.view(shape)) / deviation.view(shape)
        if self.affine:
            fixed = fixed * self.weight.view(shape) + self.bias.view(shape)
        chosen = torch.rand(len(mean), device=input.device).view(shape) < self.p
        return torch.where(chosen, fixed, super().forward(input))


def patch_class(layer: BatchNorm, mixin: type[BatchNorm]) -> None:
    """Gives a layer of any dimension the forward of `mixin`, by changing its class."""
    layer.__class__ = type(mixin.__name__, (mixin, type(layer)), {"__module__": __name__})
