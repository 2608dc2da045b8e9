"""Domain generalisation: several labelled sources, and a target that training does not see.

ERM is not a method: it is training without one. CORAL, DAN and the other discrepancies work between the sources, and
weight averaging is Lightning's `EMAWeightAveraging` callback.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tl_modules.batch import samples
from tl_modules.batch.compat import attached
from tl_modules.batch.current_domain import passing
from tl_modules.batch.output import DomainOutput, no_stats_update, weighted_mean
from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.batch.samples import AnnotatedBatch, Batch
from tl_modules.errors import UserError
from tl_modules.methods.base import Method, check_trains, sized_by_checkpoint
from tl_modules.methods.schedules import LossWeight

__all__ = ["IRM", "MLDG", "GroupDRO", "MixStyle", "Mixup", "VREx"]

GENERALISE = ("several sources", "generalisation")


def risks(source: DomainOutput | None) -> Tensor:
    """Computes the task's mean loss of each source domain, (number of domains,)."""
    assert source is not None
    return torch.stack([view.mean_loss for view in source.split()])


def risk(view: DomainOutput, output: Any) -> Tensor:
    """Computes the task's weighted mean loss of another head's or network's output for the same samples."""
    return weighted_mean(replace(view, output=output).loss, view.weight)


def scaled(tree: Any, factor: Tensor) -> Any:
    """Multiplies all tensors of a tree."""

    def scale(leaf: Any) -> Any:
        return samples.Padded(leaf.values * factor, leaf.shapes) if isinstance(leaf, samples.Padded) else leaf * factor

    return samples.map_leaves(scale, tree)


class GroupDRO(Method):
    """Group distributionally robust optimisation (Sagawa et al., ICLR 2020).

    The task's loss on the sources is `sum_e q_e R_e`; in each step `q_e` is multiplied by `exp(eta R_e)` and scaled to
    sum 1. It has no separate term.

    Args:
        eta: The step size of q; 0.01 in DomainBed.
    """

    required_domains = ("sources",)
    supported_settings = GENERALISE
    q: Tensor

    def __init__(self, eta: float = 0.01) -> None:
        super().__init__()
        self.eta = eta
        self.register_buffer("q", torch.zeros(0))
        # the number of domains is not known yet when the model is built
        sized_by_checkpoint(self, "q")

    def reweight(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> None:
        """Weights the samples of each domain by q."""
        assert source is not None
        each = risks(source)
        if len(self.q) != len(each):
            self.q = torch.full_like(each, 1 / len(each)).detach()
        if self.training:
            # average over processes, so that q is the same in all
            now = each.detach().clone()  # the reduction works in place
            now = module.trainer.strategy.reduce(now, reduce_op="mean") if attached(module) else now
            self.q *= (self.eta * now).exp()
            self.q /= self.q.sum()
        weight = torch.ones_like(source.loss) if source.weight is None else source.weight
        parts = zip(self.q, torch.split(weight, list(source.parts)), strict=True)
        source.weight = torch.cat([q * part / part.sum() for q, part in parts])

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> None:
        """Returns no term."""


class IRM(Method):
    """Invariant risk minimisation, IRMv1 (Arjovsky et al., 2019).

    `mean_e g1 g2` with `g = d/dw R_e(w * output)` at w = 1 on each half of the domain's batch, whose product is an
    unbiased estimate of the squared gradient. The weight is 1 until the share `anneal` of the run is done, then
    `penalty`. (The authors also divide the whole loss by the penalty, which has no effect with Adam, used there and in
    DomainBed.)

    Args:
        penalty: lambda after the annealing; 100 in DomainBed.
        anneal: Share of the run with weight 1; 500 of 5,000 steps in DomainBed.
    """

    required_domains = ("sources",)
    supported_settings = GENERALISE

    def __init__(self, penalty: float = 100.0, anneal: float = 0.1) -> None:
        super().__init__()
        self.penalty, self.anneal = penalty, anneal

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the weighted penalty."""
        assert source is not None
        terms = []
        for view in source.split():
            one = torch.ones((), device=view.loss.device, requires_grad=True)
            halves = [view.take(slice(i, None, 2)) for i in range(2)]
            losses = [risk(half, scaled(half.output, one)) for half in halves]
            grads = [torch.autograd.grad(loss, one, create_graph=True, allow_unused=True)[0] for loss in losses]
            if grads[0] is None:
                raise UserError(
                    "methods: IRM needs a loss that depends on the head's outputs, but that of "
                    f"{type(module).__name__} does not; leave IRM out"
                )
            terms.append(grads[0] * grads[1])
        return torch.stack(terms).mean() * (1.0 if module.progress < self.anneal else self.penalty)


class VREx(Method):
    """Risk extrapolation: the variance of the sources' risks (Krueger et al., ICML 2021).

    Args:
        weight: beta; in DomainBed 10 after 500 steps of 1.
    """

    required_domains = ("sources",)
    supported_settings = GENERALISE

    def __init__(self, weight: LossWeight = 10.0) -> None:
        super().__init__(weight)

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes `mean_e (R_e - mean R)^2`."""
        each = risks(source)
        return (each - each.mean()).square().mean()


class Mixup(Method):
    """Trains on mixed samples with mixed labels instead of the original samples (Zhang et al., ICLR 2018).

    `x = l x_i + (1 - l) x_j` and `y = l y_i + (1 - l) y_j` with l from Beta(alpha, alpha), class labels as one-hot
    vectors. A domain is mixed with itself; several sources each with the next one in a random order (DomainBed). It has
    no term: the task's loss is computed on the mixed batch.

    Args:
        alpha: Parameter of the Beta distribution; 0.2 in DomainBed.
    """

    needs_raw_input = True
    supported_settings = GENERALISE

    def __init__(self, alpha: float = 0.2) -> None:
        super().__init__()
        self.alpha = alpha

    def transform_batch(self, module: BaseTransferModule, batch: Mapping[str, Batch]) -> Mapping[str, Batch]:
        """Mixes the labelled domains."""
        mixed = dict(batch)
        for owner in ("source", "target"):
            names = [name for name, part in batch.items() if name.partition("/")[0] == owner and part.y is not None]
            order = [names[i] for i in torch.randperm(len(names)).tolist()]
            for name, other in zip(order, [*order[1:], *order[:1]], strict=True):
                mixed[name] = self.mix(module, batch[name], batch[other])
        return mixed

    def mix(self, module: BaseTransferModule, one: Batch, other: Batch) -> Any:
        """Mixes each sample of a batch with a sample of another batch."""
        share = random.betavariate(self.alpha, self.alpha)
        order = torch.randperm(samples.count(other.x))

        def mixed(a: Tensor, b: Tensor) -> Tensor:
            return share * unit(a) + (1 - share) * unit(b)[order.to(b.device)]

        def shares(y: Any) -> Any:
            is_number = module.is_classification and not y.is_floating_point()
            return F.one_hot(y, module.num_outputs).float() if is_number else y

        ys = [shares(one.y), shares(other.y)]
        xs = module.backbone.align([one.x, other.x])
        x, y = samples.map_leaves(mixed, *xs), samples.map_leaves(mixed, *ys)
        weights = samples.weights_of([one, other])
        return Batch(x, y, one.index) if weights is None else AnnotatedBatch(x, y, one.index, mixed(*weights))

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> None:
        """Returns no term."""


def unit(x: Any) -> Tensor:
    """Returns images as floats in [0, 1]; other inputs unchanged."""
    if not isinstance(x, Tensor) or (not x.is_floating_point() and x.dtype != torch.uint8):
        raise UserError("methods: Mixup mixes images and numbers, but the inputs are neither; leave it out")
    return x / 255 if x.dtype == torch.uint8 else x


class MixStyle(Method):
    """Mixes the statistics of feature maps between samples (Zhou et al., ICLR 2021); it has no term.

    After each of the first stages, with probability p, a sample's mean and deviation per channel are mixed with those
    of another sample of the batch, by l from Beta(alpha, alpha). Channels may come first or last, see `channel_axis`.

    Args:
        p: Probability of mixing; 0.5 in the paper.
        alpha: Parameter of the Beta distribution; 0.1 in the paper.
        stages: Number of the backbone's stages after which statistics are mixed.
    """

    required_domains = ("source",)
    supported_settings = GENERALISE

    def __init__(self, p: float = 0.5, alpha: float = 0.1, stages: int = 2) -> None:
        super().__init__()
        self.p, self.alpha, self.stages = p, alpha, stages

    def attach(self, module: BaseTransferModule) -> None:
        """Registers forward hooks on the first stages; frozen stages are in eval mode, where the hooks do nothing."""
        for stage in module.backbone.stages()[: self.stages]:
            last = stage[-1] if isinstance(stage, nn.ModuleList) else stage
            last.register_forward_hook(self.mix)

    def check(self, module: BaseTransferModule, domains: list[str]) -> None:
        """Also rejects first stages that never train.

        Raises:
            UserError: They are frozen for the whole run.
        """
        super().check(module, domains)
        check_trains(self, module, module.backbone.stages()[: self.stages], "the first stages")

    def mix(self, layer: nn.Module, inputs: Any, x: Any) -> Any:
        """Returns the layer's output, mixed in training."""
        if not (layer.training and self.training and isinstance(x, Tensor)) or random.random() > self.p:
            return x
        channels = channel_axis(layer, x)
        dims = tuple(d for d in range(1, x.ndim) if d != channels) or (1,)  # a vector's own mean and deviation
        mean, deviation = x.mean(dims, keepdim=True), x.std(dims, keepdim=True) + 1e-6
        share = torch.distributions.Beta(self.alpha, self.alpha).sample((len(x), *(1,) * (x.ndim - 1))).to(x)
        rows = torch.randperm(len(x))
        plain = (x - mean.detach()) / deviation.detach()
        mixed_mean = share * mean + (1 - share) * mean[rows]
        mixed_deviation = share * deviation + (1 - share) * deviation[rows]
        return plain * mixed_deviation.detach() + mixed_mean.detach()

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> None:
        """Returns no term."""


def channel_axis(layer: nn.Module, x: Tensor) -> int:
    """Returns the channel axis of a layer's output.

    (B, C, H, W) and (B, H, W, C) are distinguished by which two axes are equal, and, if that is ambiguous, by whether
    the layer begins or ends with channels: a LayerNorm is for the last axis. (B, C, L) comes from convolutions, (B, N,
    C) from other layers.
    """
    if x.ndim == 4:
        first, second, third = x.shape[1:]
        if (second == third) != (first == second):
            return 1 if second == third else 3
        return 3 if any(isinstance(m, nn.LayerNorm) for m in layer.modules()) else 1
    return 2 if x.ndim == 3 and not any(isinstance(m, nn.Conv1d) for m in layer.modules()) else 1


class MLDG(Method):
    """Meta-learning domain generalisation (Li et al., AAAI 2018): a step on some sources must help another source.

    `R_test(theta - lr dR_train / dtheta)`, including the second-order gradient, with one source drawn for the test in
    each step and the others for training. The task's own term, the paper's R_train, is over all sources.

    Args:
        weight: beta; 1 in the paper.
        lr: alpha, of the inner step; 5e-4 in the paper, as in the outer step.
    """

    required_domains = ("sources",)
    needs_raw_input = True
    supported_settings = GENERALISE

    def __init__(self, weight: LossWeight = 1.0, lr: float = 1e-3) -> None:
        super().__init__(weight)
        self.lr = lr

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the risk of the held-out source after the inner step."""
        assert source is not None
        views = source.split()
        held_out = int(torch.randint(len(views), ()))
        training = [view.mean_loss for i, view in enumerate(views) if i != held_out]
        trained = {id(p) for p in module.network_parameters() if p.requires_grad}
        named = {name: p for name, p in module.named_parameters() if id(p) in trained}
        grads = torch.autograd.grad(
            torch.stack(training).mean(), list(named.values()), create_graph=True, materialize_grads=True
        )
        moved = {name: p - self.lr * g for (name, p), g in zip(named.items(), grads, strict=True)}
        view = views[held_out]
        with passing([("source", len(view))]), no_stats_update(module):
            return risk(view, torch.func.functional_call(module, moved, (view.x,)))
