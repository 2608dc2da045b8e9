"""A network that teaches itself on the unlabelled target: by its own certain answers, or by its own average."""

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
    """What is certain of a sample is to hold for a strongly changed copy of it (Sohn et al., NeurIPS 2020).

    `mean 1[max p >= threshold] CE(output(strong(x)), argmax p)` on the target; the weak view is the batch itself, with
    the data's `augment`. With few labels the paper has 7 unlabelled samples in a step for each labelled one,
    `--data.unlabelled_ratio 7`.

    Args:
        weight: Of the term.
        threshold: How certain; the paper takes 0.95.
        strength: Of the change, see `functional.strong_augment`.
    """

    required_domains = ("target",)
    needs_classes = True
    needs_raw_input = True
    supported_settings = ("several sources", "partial", "source-free")

    def __init__(self, weight: LossWeight = 1.0, threshold: float = 0.95, strength: float = 1.0) -> None:
        super().__init__(weight)
        self.threshold, self.strength = threshold, strength

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """The mean over all samples, those that are not certain with 0."""
        assert target is not None
        certainty, label = target.probabilities.detach().max(1)
        strong = module.forward_extra(strong_augment(target.x, self.strength)).output
        each = F.cross_entropy(strong, label, reduction="none")
        return ((certainty >= self.threshold) * each).mean()


class MeanTeacher(Method):
    """An average of the network's past weights teaches it (Tarvainen and Valpola, 2017; French et al., ICLR 2018).

    `mean_i m_i mean_c (p_ic - q_ic)^2 + balance mean_i m_i sum_c BCE(mean_i p_ic, 1 / C)` as in French's code, with q
    the teacher's probabilities of the target's samples, p the student's of strongly changed copies, and m_i 1 where
    `max_c q_ic >= threshold` and 0 elsewhere. Without classes, the mean squared difference of the outputs. Theirs has
    its full weight at once; here the term grows from 0 like DANN's ramp.

    Args:
        weight: Of the term; French takes 3.
        momentum: Of the average, taken after each step.
        threshold: How certain the teacher must be of a sample; French takes 0.968.
        strength: Of the change, see `functional.strong_augment`.
        balance: Weight of the second part, which is large where classes die out; French takes 0.005.
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
        self.teacher.requires_grad_(False).eval()  # Lightning leaves the modes of a fit as they are
        self.register_buffer("seen", torch.full((), -1))  # steps; before the first one it is the network itself

    def train(self, mode: bool = True) -> MeanTeacher:
        """The teacher is always in eval mode."""
        super().train(mode)
        if hasattr(self, "teacher"):
            self.teacher.eval()
        return self

    @torch.no_grad()
    def update_teacher(self, module: BaseTransferModule) -> None:
        """Moves the teacher towards the network, once a step; in the first one it becomes the network."""
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
        """The consistency on the target."""
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
    # in this order older checkpoints keep their names
    return nn.Sequential(module.backbone, module.head, module.bottleneck)


class PseudoLabel(Method):
    """Takes the certain decisions for labels (Lee, ICML workshops 2013).

    `mean 1[max p >= threshold] CE(output, argmax p)` on the target.

    Args:
        weight: Of the term.
        threshold: How certain.
    """

    required_domains = ("target",)
    needs_classes = True
    supported_settings = ("several sources", "partial", "source-free")

    def __init__(self, weight: LossWeight = 1.0, threshold: float = 0.95) -> None:
        super().__init__(weight)
        self.threshold = threshold

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """The mean over all samples, those that are not certain with 0."""
        assert target is not None
        certainty, label = target.probabilities.detach().max(1)
        each = F.cross_entropy(target.output, label, reduction="none")
        return ((certainty >= self.threshold) * each).mean()


class SHOT(Method):
    """Source hypothesis transfer: adapts a source model without source data (Liang et al., ICML 2020).

    The head, the source's hypothesis, is frozen; the backbone learns `mean H(p) - H(mean p) + beta CE(output, y)`.
    The pseudo-labels y come from a pass over all of the target before each epoch: each sample gets the class whose
    centroid is nearest by the cosine, the centroids being means of the features, first weighted by the probabilities
    and then over the samples of each class. Start from a run of the source, `--model.backbone.weights RUN` with the
    same classes.

    Args:
        weight: Of the term.
        beta: Weight of the pseudo-labels; the paper takes 0.3 (0.1 for digits).
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
        sized_by_checkpoint(self, "labels")  # the model is built before the data says how many samples there are

    def attach(self, module: BaseTransferModule) -> None:
        """Freezes the head."""
        module.head.requires_grad_(False)

    def check(self, module: BaseTransferModule, domains: list[str]) -> None:
        """Also refuses to start from a head that knows nothing.

        Raises:
            UserError: The head is not the source's.
        """
        super().check(module, domains)
        check_head(self, module)

    def on_full_pass(self, module: BaseTransferModule, domain: str, outputs: Iterator[DomainOutput]) -> None:
        """Labels all samples of the target anew.

        Raises:
            UserError: The loaders don't number them.
        """
        found = [(out.index, F.normalize(out.pooled), out.probabilities) for out in outputs]
        if found[0][0] is None:
            raise UserError("methods: SHOT needs to know which sample is which; let the loaders give (x, y, index)")
        index, features, p = (torch.cat(column) for column in zip(*found, strict=True))
        there = torch.unique(p.argmax(1))  # a class that no sample is decided for gets none
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
