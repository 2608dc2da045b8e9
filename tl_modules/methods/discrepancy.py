"""Distances between the domains' features, which training minimises."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tl_modules.batch.output import DomainOutput
from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.errors import UserError
from tl_modules.methods.base import Method, pairs
from tl_modules.methods.functional import (
    gaussian_kernel,
    gaussians,
    joint_mmd,
    mmd,
    relative_coral,
    sliced_wasserstein,
    squared_distances,
)
from tl_modules.methods.schedules import LossWeight

__all__ = ["AFN", "CORAL", "DAN", "JAN", "SWD", "DeepJDOT"]


class Discrepancy(Method):
    """The mean of a distance over the pairs of domains: source and target, or every two of several sources.

    A subclass implements `distance`.
    """

    required_domains = ("domains",)
    supported_settings = ("several sources", "generalisation")

    def distance(self, one: DomainOutput, other: DomainOutput) -> Tensor:
        """Computes the distance of two domains, a scalar."""
        raise NotImplementedError

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the mean over the pairs."""
        return torch.stack([self.distance(one, other) for one, other in pairs(source, target)]).mean()


class DAN(Discrepancy):
    """Deep adaptation network: MMD of the features with several kernels (Long et al., ICML 2015)."""

    def distance(self, one: DomainOutput, other: DomainOutput) -> Tensor:
        """Computes `MMD^2(features, features)`."""
        return mmd(one.pooled, other.pooled)


class JAN(Discrepancy):
    """Joint adaptation network: the joint MMD of features and class probabilities (Long et al., ICML 2017).

    As in the authors' code, the features have the five kernels of DAN and the probabilities one, `exp(-||p - q||^2 /
    1.68)`.
    """

    needs_classes = True

    def distance(self, one: DomainOutput, other: DomainOutput) -> Tensor:
        """Computes `MMD^2` with the product of the kernels of both layers."""
        xs, ys = ([view.pooled, view.probabilities] for view in (one, other))
        return joint_mmd(xs, ys, kernels=[gaussian_kernel, lambda p: gaussians(squared_distances(p), [1.68])])


class CORAL(Discrepancy):
    """Deep CORAL: equal covariances of the features (Sun and Saenko, ECCV workshops 2016).

    `||C_S - C_T||_F^2 / (||C_S||_F^2 + ||C_T||_F^2)`. The paper divides by `4 D^2`, and chooses the weight for each
    network so that the term ends as large as the task's loss: with weight 1 it had hardly any effect on most features,
    since it grows with the fourth power of their scale. Divided by its own scale, one weight fits all.

    Args:
        weight: The term's weight.
        mean: Adds the squared distance of the means over the sum of the variances, `||m_S - m_T||^2 / (tr C_S + tr
            C_T)`; DomainBed also compares the means.
    """

    def __init__(self, weight: LossWeight = 0.03, mean: bool = False) -> None:
        super().__init__(weight)
        self.mean = mean

    def distance(self, one: DomainOutput, other: DomainOutput) -> Tensor:
        """Computes the distance of the covariances, and optionally of the means."""
        return relative_coral(one.pooled, other.pooled, self.mean)


class SWD(Discrepancy):
    """Sliced Wasserstein distance of the features, with new random directions in each step.

    The distance is that of Bonneel et al. (Journal of Mathematical Imaging and Vision, 2015), between the domains'
    features as in Gabourie et al. (Allerton 2019), without their pseudo-labels. The sliced Wasserstein *discrepancy* of
    Lee et al. (CVPR 2019) is another method, in which two classifiers play against the features, as in `MCD`.

    Args:
        weight: The term's weight.
        directions: Number of directions.
    """

    def __init__(self, weight: LossWeight = 1.0, directions: int = 128) -> None:
        super().__init__(weight)
        self.directions = directions

    def distance(self, one: DomainOutput, other: DomainOutput) -> Tensor:
        """Computes the mean over the directions of the squared Wasserstein-2 distance."""
        x, y = one.pooled, other.pooled
        directions = F.normalize(torch.randn(x.shape[1], self.directions, device=x.device, dtype=x.dtype), dim=0)
        return sliced_wasserstein(x, y, directions)


class DeepJDOT(Discrepancy):
    """Joint distribution optimal transport: the cost of moving one domain to the other (Damodaran et al., ECCV 2018).

    `sum_ij G_ij (alpha ||f_i - f_j||^2 / D + beta CE(output_j, y_i))` with G the optimal plan of the batch
    (`pip install 'lightning-transfer[ot]'`), which is detached. Without classes, beta is 0.

    Args:
        weight: The term's weight.
        alpha: Weight of the features' squared distance, a mean over their D values.
        beta: Weight of the label's cross-entropy.
    """

    def __init__(self, weight: LossWeight = 1.0, alpha: float = 1.0, beta: float = 1.0) -> None:
        super().__init__(weight)
        self.alpha, self.beta = alpha, beta

    def attach(self, module: BaseTransferModule) -> None:
        """Fails early if POT, the solver, is not installed."""
        self.is_classification = module.is_classification
        try:
            import ot  # noqa: F401
        except ImportError as error:
            raise UserError(
                "DeepJDOT needs POT: pip install 'lightning-transfer[ot]' (or python -m pip install pot)"
            ) from error

    def distance(self, one: DomainOutput, other: DomainOutput) -> Tensor:
        """Computes the cost of the transport."""
        import ot

        cost = self.alpha * torch.cdist(one.pooled, other.pooled).square() / one.pooled.shape[1]
        if self.is_classification and one.y is not None:
            shares = one.y if one.y.is_floating_point() else F.one_hot(one.y, other.output.shape[1]).to(cost)
            cost = cost - self.beta * shares @ other.output.log_softmax(1).T
        weights = [torch.full((size,), 1 / size, dtype=torch.float64) for size in cost.shape]
        plan = ot.emd(*(w.numpy() for w in weights), cost.detach().double().cpu().numpy())
        return (torch.from_numpy(plan).to(cost) * cost).sum()


class AFN(Method):
    """Adaptive feature norm, stepwise (Xu et al., ICCV 2019): features of larger norm transfer better.

    `mean (||f|| - (||f||_detached + step))^2` over all samples of both domains. As in the authors' code each domain
    passes through the network separately: in a joint batch, BatchNorm's statistics would tie the norms of one domain to
    those of the other.

    Args:
        weight: The term's weight; in the paper 0.05 for each of two domains.
        step: How much a norm should grow; 1 in the paper.
    """

    separate_domains = True
    supported_settings = ("several sources", "generalisation", "partial", "source-free")

    def __init__(self, weight: LossWeight = 0.1, step: float = 1.0) -> None:
        super().__init__(weight)
        self.step = step

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the mean over all samples."""
        norms = torch.cat([view.pooled.norm(dim=1) for view in (source, target) if view is not None])
        return (norms - (norms.detach() + self.step)).square().mean()
