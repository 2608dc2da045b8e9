"""Self-training on the unlabelled target: with confident predictions, or with an average of past weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tl_modules.batch.output import DomainOutput
from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.errors import UserError
from tl_modules.methods.base import Method, check_head, sized_by_checkpoint
from tl_modules.methods.functional import mutual_information, ramp, strong_augment
from tl_modules.methods.schedules import LossWeight

__all__ = ["SHOT", "FixMatch", "MeanTeacher", "PseudoLabel"]


class FixMatch(Method):
    """Confident predictions on a sample become labels of a strongly augmented copy of it (Sohn et al., NeurIPS 2020).

    `mean 1[max p >= threshold] CE(output(strong(x)), argmax p)` on the target; the weak view is the batch itself, with
    the data's `augment`. With few labels the paper uses 7 unlabelled samples per labelled one in a step,
    `--data.unlabelled_ratio 7`.

    Args:
        weight: The term's weight.
        threshold: Minimum confidence; 0.95 in the paper.
        strength: Strength of the augmentation, see `functional.strong_augment`.
    """

    required_domains = ("target",)
    needs_classes = True
    needs_raw_input = True
    supported_settings = ("several sources", "partial", "source-free")

    def __init__(self, weight: LossWeight = 1.0, threshold: float = 0.95, strength: float = 1.0) -> None:
        super().__init__(weight)
        self.threshold, self.strength = threshold, strength

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the mean over all samples; samples that are not confident count as 0."""
        assert target is not None
        certainty, label = target.probabilities.detach().max(1)
        strong = module.forward_extra(strong_augment(target.x, self.strength)).output
        each = F.cross_entropy(strong, label, reduction="none")
        return ((certainty >= self.threshold) * each).mean()


class MeanTeacher(Method):
    """An average of the network's past weights teaches it (Tarvainen and Valpola, 2017; French et al., ICLR 2018).

    `mean_i m_i mean_c (p_ic - q_ic)^2 + balance mean_i m_i sum_c BCE(mean_i p_ic, 1 / C)` as in French's code, with q
    the teacher's probabilities of the target's samples, p the student's of strongly augmented copies, and m_i 1 if
    `max_c q_ic >= threshold` and 0 otherwise. Without classes, the mean squared difference of the outputs. French's
    code applies the full weight at once; here the term grows from 0 like DANN's ramp.

    Args:
        weight: The term's weight; 3 in French et al.
        momentum: Momentum of the average, updated after each step.
        threshold: The teacher's minimum confidence for a sample; 0.968 in French et al.
        strength: Strength of the augmentation, see `functional.strong_augment`.
        balance: Weight of the second part, which is large if classes collapse; 0.005 in French et al.
    """

    required_domains = ("target",)
    needs_raw_input = True
    supported_settings = ("several sources", "source-free")

    def __init__(
        self,
        weight: LossWeight = 3.0,
        momentum: float = 0.99,
        threshold: float = 0.968,
        strength: float = 1.0,
        balance: float = 0.005,
    ) -> None:
        super().__init__(weight)
        self.momentum, self.threshold, self.strength, self.balance = momentum, threshold, strength, balance

    def attach(self, module: BaseTransferModule) -> None:
        """Copies the network."""
        self.teacher = copy.deepcopy(_network(module))
        self.teacher.requires_grad_(False).eval()  # Lightning does not change modes when a fit starts
        self.register_buffer("seen", torch.full((), -1))  # steps; before the first one the teacher equals the network

    def train(self, mode: bool = True) -> MeanTeacher:
        """Sets the mode, but keeps the teacher in eval mode."""
        super().train(mode)
        if hasattr(self, "teacher"):
            self.teacher.eval()
        return self

    @torch.no_grad()
    def update_teacher(self, module: BaseTransferModule) -> None:
        """Updates the teacher's average, once per step; in the first step it copies the network."""
        seen = self.get_buffer("seen")
        if int(seen) == module.global_step:
            return
        momentum = self.momentum if seen >= 0 else 0.0
        seen.fill_(module.global_step)
        student = _network(module).state_dict()
        for name, mine in self.teacher.state_dict().items():
            if mine.is_floating_point():
                mine.lerp_(student[name], 1 - momentum)
            else:
                mine.copy_(student[name])

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the consistency on the target."""
        assert target is not None
        if self.training:
            self.update_teacher(module)
        changed = strong_augment(target.x, self.strength)
        with torch.no_grad():
            features = self.teacher[0](target.x)
            features = module.backbone.pooled_features(features) if module.uses_pooled_features else features
            taught: Tensor = self.teacher[1](self.teacher[2](features))
        output: Tensor = module.forward_extra(changed).output
        scale = ramp(module.progress)
        if not module.is_classification:
            return scale * F.mse_loss(output, taught)
        p, q = output.softmax(1), taught.softmax(1)
        certain = (q.max(1).values >= self.threshold).to(p)
        share = p.mean(0).clamp(1e-6, 1 - 1e-6)
        balance = F.binary_cross_entropy(share, torch.full_like(share, 1 / len(share)), reduction="sum")
        return scale * ((certain * (p - q).square().mean(1)).mean() + self.balance * certain.mean() * balance)


def _network(module: BaseTransferModule) -> nn.Sequential:
    # this order keeps the names in older checkpoints
    return nn.Sequential(module.backbone, module.head, module.bottleneck)


class PseudoLabel(Method):
    """Uses confident predictions as labels (Lee, ICML workshops 2013).

    `mean 1[max p >= threshold] CE(output, argmax p)` on the target.

    Args:
        weight: The term's weight.
        threshold: Minimum confidence.
    """

    required_domains = ("target",)
    needs_classes = True
    supported_settings = ("several sources", "partial", "source-free")

    def __init__(self, weight: LossWeight = 1.0, threshold: float = 0.95) -> None:
        super().__init__(weight)
        self.threshold = threshold

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the mean over all samples; samples that are not confident count as 0."""
        assert target is not None
        certainty, label = target.probabilities.detach().max(1)
        each = F.cross_entropy(target.output, label, reduction="none")
        return ((certainty >= self.threshold) * each).mean()


class SHOT(Method):
    """Source hypothesis transfer: adapts a source model without source data (Liang et al., ICML 2020).

    The head, the source's hypothesis, is frozen; the backbone learns `mean H(p) - H(mean p) + beta CE(output, y)`.
    The pseudo-labels y come from a pass over the whole target before each epoch: each sample gets the class whose
    centroid is nearest by cosine; centroids are means of the features, first weighted by the probabilities and then
    over the samples of each class. Start from a run on the source, `--model.backbone.weights RUN` with the same
    classes.

    Args:
        weight: The term's weight.
        beta: Weight of the pseudo-labels; 0.3 in the paper (0.1 for digits).
    """

    required_domains = ("target",)
    needs_classes = True
    full_pass = ("target",)
    supported_settings = ("source-free",)
    labels: Tensor

    def __init__(self, weight: LossWeight = 1.0, beta: float = 0.3) -> None:
        super().__init__(weight)
        self.beta = beta
        self.register_buffer("labels", torch.zeros(0, dtype=torch.long))
        sized_by_checkpoint(self, "labels")  # the number of samples is not known yet when the model is built

    def attach(self, module: BaseTransferModule) -> None:
        """Freezes the head."""
        module.head.requires_grad_(False)

    def check(self, module: BaseTransferModule, domains: list[str]) -> None:
        """Also rejects a head that starts at random.

        Raises:
            UserError: The head does not come from the source.
        """
        super().check(module, domains)
        check_head(self, module)

    def on_full_pass(self, module: BaseTransferModule, domain: str, outputs: Iterator[DomainOutput]) -> None:
        """Computes new pseudo-labels for all samples of the target.

        Raises:
            UserError: The loaders do not number the samples.
        """
        found = [(out.index, F.normalize(out.pooled), out.probabilities) for out in outputs]
        if found[0][0] is None:
            raise UserError("methods: SHOT needs the samples' numbers; the loaders must return (x, y, index)")
        index, features, p = (torch.cat(column) for column in zip(*found, strict=True))
        there = torch.unique(p.argmax(1))  # classes that are never predicted get no label
        share = p[:, there]
        for _ in range(2):
            centroids = share.T @ features / share.sum(0)[:, None].clamp(min=1e-8)
            nearest = (features @ F.normalize(centroids).T).argmax(1)
            share = F.one_hot(nearest, len(there)).to(p)
        more = int(index.max()) + 1 - len(self.labels)
        self.labels = F.pad(self.labels.to(index.device), (0, max(0, more)))
        self.labels[index] = there[nearest]

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes information maximisation and the cross-entropy of the pseudo-labels."""
        assert target is not None
        assert target.index is not None
        return -mutual_information(target.probabilities) + self.beta * F.cross_entropy(
            target.output, self.labels[target.index]
        )
