"""Adversarial alignment: features are trained so that a critic cannot tell the domains (or two classifiers) apart.

features --x--> critic        x: the gradient is reversed, so one optimizer trains both sides
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tl_modules.batch import samples
from tl_modules.batch.output import DomainOutput, no_stats_update, weighted_mean
from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.batch.samples import Batch
from tl_modules.errors import UserError
from tl_modules.heads import MLPHead
from tl_modules.methods.base import Method, check_head
from tl_modules.methods.functional import certainty_weights, detached_call, ramp, reverse_gradient
from tl_modules.methods.regularization import WithPretrainedCopy
from tl_modules.methods.schedules import LossWeight

__all__ = ["ADDA", "CDAN", "DANN", "MCD", "MDD", "OSBP", "PADA"]


class Adversarial(Method):
    """A critic of features, with a schedule for the backbone's adversarial gradient.

    Args:
        weight: lambda, the term's weight.
        hidden: Width of the critic's hidden layers.
        gamma: Steepness of the schedule of the backbone's gradient, `2 / (1 + exp(-gamma p)) - 1` of the run's progress
            p; 0 applies it fully from the start.
        batch_norm: Normalises the critic's hidden units over the samples of both domains.
        layers: Number of the critic's hidden layers.
    """

    required_domains = ("source", "target")

    def __init__(
        self,
        weight: LossWeight = 1.0,
        hidden: int = 1024,
        gamma: float = 10.0,
        batch_norm: bool = True,
        layers: int = 2,
    ) -> None:
        super().__init__(weight)
        self.hidden, self.gamma, self.batch_norm, self.layers = hidden, gamma, batch_norm, layers

    def build_critic(self, width: int) -> nn.Sequential:
        """Builds the critic, from features (B, width) to the logit (B, 1) of the source."""
        inner: list[nn.Module] = []
        for inputs in [width, *[self.hidden] * (self.layers - 2)][: self.layers - 1]:
            norm = [nn.BatchNorm1d(self.hidden)] if self.batch_norm else []
            inner += [nn.Linear(inputs, self.hidden), *norm, nn.ReLU()]
        inputs = self.hidden if inner else width
        return nn.Sequential(*inner, *MLPHead(inputs, 1, self.hidden, batch_norm=self.batch_norm, normalize=False))

    def reversal(self, module: BaseTransferModule) -> float:
        """Returns the current scale of the reversed gradient."""
        return ramp(module.progress, self.gamma) if self.gamma else 1.0


class DANN(Adversarial):
    """Domain-adversarial training (Ganin et al., JMLR 2016).

    A critic learns `BCE(critic(features), domain)`; the backbone gets the reversed gradient, scaled by `2 / (1 +
    exp(-gamma p)) - 1` with p the progress of the run. The critic is that of Transfer-Learning-Library; the paper's has
    no BatchNorm.

    Args:
        weight: lambda, the term's weight.
        hidden: Width of the critic's hidden layers (in the paper 100 for digits, 1024 for Office).
        gamma: Steepness of the reversal's schedule; 0 reverses fully from the start. 10 in the paper.
        batch_norm: Normalises the critic's hidden units over the samples of both domains.
        layers: Number of the critic's hidden layers.
    """

    supported_settings: ClassVar[tuple[str, ...]] = ("several sources",)

    def attach(self, module: BaseTransferModule) -> None:
        """Builds the critic."""
        self.critic = self.build_critic(self.width(module))

    def width(self, module: BaseTransferModule) -> int:
        """Returns the width of the critic's input."""
        return module.width

    def critic_input(self, module: BaseTransferModule, view: DomainOutput) -> Tensor:
        """Returns the critic's input for a domain, (B, width)."""
        return view.pooled

    def sample_weights(self, view: DomainOutput) -> Tensor:
        """Returns the weight of each sample, (B,) with mean 1."""
        return torch.ones(len(view), device=view.pooled.device)

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the critic's cross-entropy, the mean over both domains."""
        assert source is not None
        assert target is not None
        scale = self.reversal(module)
        seen = torch.cat([self.critic_input(module, view) for view in (source, target)])
        logits = self.critic(reverse_gradient(seen, scale)).squeeze(1).split([len(source), len(target)])
        each = (_bce(logits[0], 1.0, "none"), _bce(logits[1], 0.0, "none"))
        losses = [(self.sample_weights(v) * loss).mean() for v, loss in zip((source, target), each, strict=True)]
        return (losses[0] + losses[1]) / 2


class CDAN(DANN):
    """Conditional domain-adversarial training (Long et al., NeurIPS 2018): the critic sees features x probabilities.

    If features times classes exceed 4,096, both are randomly projected to 1,024 values and multiplied. The critic is
    smaller than the authors' (two layers of 1024), which performed worse.

    Args:
        weight: The term's weight.
        hidden: As for `DANN`.
        gamma: As for `DANN`.
        batch_norm: As for `DANN`.
        layers: As for `DANN`.
        entropy: Weights samples by `1 + exp(-H(p))`, which is CDAN+E.
    """

    needs_classes = True

    def __init__(
        self,
        weight: LossWeight = 1.0,
        hidden: int = 256,
        gamma: float = 10.0,
        batch_norm: bool = False,
        layers: int = 1,
        entropy: bool = True,
    ) -> None:
        super().__init__(weight, hidden, gamma, batch_norm, layers)
        self.entropy = entropy

    def width(self, module: BaseTransferModule) -> int:
        """Returns the width of the product, or of the random projections."""
        features, classes = module.width, module.num_outputs
        self.projected = features * classes > 4096
        if self.projected:
            self.register_buffer("features_to", torch.randn(features, 1024) / 32)
            self.register_buffer("classes_to", torch.randn(classes, 1024))
        return 1024 if self.projected else features * classes

    def critic_input(self, module: BaseTransferModule, view: DomainOutput) -> Tensor:
        """Returns features x probabilities; the probabilities are detached, as in the authors' code."""
        p = view.probabilities.detach()
        if self.projected:
            return (view.pooled @ self.get_buffer("features_to")) * (p @ self.get_buffer("classes_to"))
        return torch.einsum("bc,bd->bcd", p, view.pooled).flatten(1)

    def sample_weights(self, view: DomainOutput) -> Tensor:
        """Returns larger weights for confident samples."""
        return certainty_weights(view.probabilities) if self.entropy else super().sample_weights(view)


class PADA(DANN):
    """Partial adversarial adaptation (Cao et al., ECCV 2018): down-weights source classes that the target lacks.

    A class's weight is the target's mean probability of it, scaled to a maximum of 1, as a running mean; it weights the
    source's part of the critic's loss and the task's loss on the source.

    Args:
        *args: As for `DANN`.
        momentum: Momentum of the running mean.
        **kwargs: As for `DANN`.
    """

    needs_classes = True
    supported_settings = ("several sources", "partial")

    def __init__(self, *args: Any, momentum: float = 0.99, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.momentum = momentum

    def attach(self, module: BaseTransferModule) -> None:
        """Initialises equal class weights."""
        super().attach(module)
        self.register_buffer("share", torch.full((module.num_outputs,), 1 / module.num_outputs))

    def sample_weights(self, view: DomainOutput) -> Tensor:
        """Returns the weight of each sample's class; 1 in the target."""
        if view.y is None:
            return super().sample_weights(view)
        share = self.get_buffer("share")
        share = share / share.max()
        return view.y @ share if view.y.is_floating_point() else share[view.y]

    def reweight(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> None:
        """Weights the source's samples by their classes."""
        assert source is not None
        assert target is not None
        if self.training:
            share = self.get_buffer("share")
            share.lerp_(target.probabilities.detach().mean(0), 1 - self.momentum)
        weight = self.sample_weights(source)
        source.weight = weight if source.weight is None else source.weight * weight

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the critic's term; labels of the target are not used."""
        assert target is not None
        return super().forward(module, source, replace(target, y=None))


class OSBP(Method):
    """Open-set adaptation by backpropagation (Saito et al., ECCV 2018); the last class is "unknown".

    The term on the target is `-t log p - (1 - t) log(1 - p)` with p the probability of "unknown": the head minimises
    it, and the backbone, whose gradient is reversed, moves each sample towards a known class or towards "unknown".

    Args:
        weight: The term's weight.
        threshold: t.
    """

    required_domains = ("source", "target")
    needs_classes = True
    supported_settings = ("several sources", "open set")

    def __init__(self, weight: LossWeight = 1.0, threshold: float = 0.5) -> None:
        super().__init__(weight)
        self.threshold = threshold

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the term on the target."""
        assert target is not None
        with no_stats_update(module.head):
            logs: Tensor = module.head(reverse_gradient(target.pooled)).log_softmax(1)
        known = logs[:, :-1].logsumexp(1)
        return -(self.threshold * logs[:, -1] + (1 - self.threshold) * known).mean()


class MDD(Method):
    """Margin disparity discrepancy (Zhang et al., ICML 2019).

    A second head f' agrees with the first head's prediction y on the source and disagrees on the target: `margin *
    CE(f'(source), y) - log(1 - softmax(f'(target))_y)`; the backbone's gradient is reversed.

    Args:
        weight: The term's weight.
        margin: gamma, the weight of the source's part; 4 in the paper.
        reversal: Final scale of the reversal, which grows as in DANN; 0.1 in the paper.
        hidden: Width of the second head's hidden layer (the authors' code: 1024).
        dropout: Dropout in the second head, as in the authors' code, whose first head also has two layers.
    """

    required_domains = ("source", "target")
    needs_classes = True

    def __init__(
        self,
        weight: LossWeight = 1.0,
        margin: float = 4.0,
        reversal: float = 0.1,
        hidden: int = 256,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(weight)
        self.margin, self.reversal, self.hidden, self.dropout = margin, reversal, hidden, dropout

    def attach(self, module: BaseTransferModule) -> None:
        """Builds the second head."""
        self.adversary = MLPHead(module.width, module.num_outputs, self.hidden, self.dropout, normalize=False)

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the negative disparity, which the second head minimises and the backbone maximises."""
        assert source is not None
        assert target is not None
        scale = self.reversal * ramp(module.progress)
        here, there = (cast(Tensor, self.adversary(reverse_gradient(v.pooled, scale))) for v in (source, target))
        agreed = F.cross_entropy(here, source.output.argmax(1))
        # log(1 - p) as a sum over the other classes loses no precision
        own = F.one_hot(target.output.argmax(1), there.shape[1]).bool()
        others = there.log_softmax(1).masked_fill(own, -torch.inf).logsumexp(1)
        return self.margin * agreed - others.mean()


class MCD(Method):
    """Maximum classifier discrepancy (Saito et al., CVPR 2018), in one step by gradient reversal.

    A second head also learns the source; both heads maximise `mean |p1 - p2|` on the target, the backbone minimises it.
    The paper alternates three steps; a single step with a reversed gradient is its authors' other version.

    Args:
        weight: The term's weight.
        reversal: Scale of the reversal.
    """

    required_domains = ("source", "target")
    needs_classes = True

    def __init__(self, weight: LossWeight = 1.0, reversal: float = 1.0) -> None:
        super().__init__(weight)
        self.reversal = reversal

    def attach(self, module: BaseTransferModule) -> None:
        """Builds a second head like the first, with other initial weights."""
        self.second = copy.deepcopy(module.head)
        for layer in self.second.modules():
            reset: Callable[[], None] = getattr(layer, "reset_parameters", lambda: None)
            reset()

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the second head's loss on the source, minus the discrepancy on the target."""
        assert source is not None
        assert target is not None
        features = reverse_gradient(target.pooled, self.reversal)
        with no_stats_update(module.head):
            discrepancy = (module.head(features).softmax(1) - self.second(features).softmax(1)).abs().mean()
        assert source.y is not None
        loss = replace(source, output=self.second(source.pooled)).loss
        return weighted_mean(loss, source.weight) - cast(Tensor, discrepancy)


class ADDA(WithPretrainedCopy, Adversarial):
    """Adversarial discriminative adaptation (Tzeng et al., CVPR 2017): the second of its two steps.

    Start from a run that was trained on the source (`--model.backbone.weights RUN`). A copy of the initial network
    stays the source's encoder; the backbone becomes the target's, gets only the target, and learns to make a critic
    take it for the source: with inverted labels, since gradient reversal would vanish. The head is frozen, and labels
    are not used.

    Args:
        weight: The term's weight.
        hidden: Width of the critic's hidden layers (500 in the paper).
        gamma: Steepness of the schedule of the inverted label's part, as in `DANN`; 0 applies it fully from the start.
        batch_norm: Normalises the critic's hidden units over the samples of both domains.
        layers: Number of the critic's hidden layers.
    """

    source_x: Any

    def attach(self, module: BaseTransferModule) -> None:
        """Copies the encoder, freezes the head and builds the critic."""
        super().attach(module)
        module.head.requires_grad_(False)
        self.bottleneck = copy.deepcopy(module.bottleneck).requires_grad_(False)
        self.critic = self.build_critic(module.width)

    def check(self, module: BaseTransferModule, domains: list[str]) -> None:
        """Also rejects a head that starts at random.

        Raises:
            UserError: The head does not come from the source.
        """
        super().check(module, domains)
        check_head(self, module)
        for _, method in module.named_methods():
            if method is not self and {"source", "domains"} & set(method.required_domains):
                raise UserError(
                    f"methods: {type(method).__name__} needs the source's features, but beside ADDA the backbone sees "
                    "only the target; leave one of them out"
                )

    def transform_batch(self, module: BaseTransferModule, batch: Mapping[str, Batch]) -> Mapping[str, Batch]:
        """Keeps the source's inputs for the critic, so that the backbone's BatchNorm sees only the target."""
        self.source_x = samples.concat([part.x for name, part in batch.items() if name != "target"])
        return {"target": batch["target"]}

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the critic's cross-entropy, and the backbone's with the inverted label."""
        assert target is not None
        with torch.no_grad():
            here = self.bottleneck.eval()(self.before(self.source_x))
        seen = self.critic(torch.cat([here, target.pooled.detach()])).split([len(here), len(target)])
        taken = detached_call(self.critic, torch.cat([here, target.pooled]))[len(here) :]
        return (_bce(seen[0], 1.0) + _bce(seen[1], 0.0)) / 2 + self.reversal(module) * _bce(taken, 1.0)


def _bce(logits: Tensor, label: float, reduction: str = "mean") -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label), reduction=reduction)
