"""The maths of transfer learning as pure functions: tensors in, tensors out.

Features are (B, D), logits (B, C), probabilities (B, C) with rows that sum to 1; a loss is a scalar.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tl_modules.errors import UserError


def ramp(progress: float, gamma: float = 10.0) -> float:
    """Computes `2 / (1 + exp(-gamma p)) - 1`: 0 at the start, near 1 at the end (Ganin et al., JMLR 2016)."""
    return 2 / (1 + math.exp(-gamma * progress)) - 1


# Gradients


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * grads[0], None


def reverse_gradient(x: Tensor, scale: float = 1.0) -> Tensor:
    """Returns x; its gradient is multiplied by `-scale` (Ganin and Lempitsky, ICML 2015)."""
    return cast(Tensor, _Reverse.apply(x, scale))


def detached_call(module: nn.Module, *args: Tensor) -> Tensor:
    """Calls a module with gradients to its inputs but not to its parameters."""
    fixed = {name: p.detach() for name, p in module.named_parameters()}
    return cast(Tensor, torch.func.functional_call(module, fixed, args))


# Distances between two samples of features


def squared_distances(x: Tensor) -> Tensor:
    """Computes `||x_i - x_j||^2` of all pairs of rows, (N, D) -> (N, N)."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()


def gaussians(squared: Tensor, widths: Sequence[float | Tensor]) -> Tensor:
    """Computes `sum_w exp(-squared / w)`: Gaussian kernels of squared distances."""
    return torch.stack([torch.exp(-squared / width) for width in widths]).sum(0)


def gaussian_kernel(x: Tensor, factors: Sequence[float] = (0.125, 0.25, 0.5, 1.0, 2.0)) -> Tensor:
    """Computes Gaussian kernels with bandwidths relative to the sample, (N, D) -> (N, N).

    Their widths are `2 f m` with m the mean squared distance of the pairs, which is detached; the factors are those of
    DAN (Long et al., ICML 2015), powers of two around the median heuristic.
    """
    squared = squared_distances(x)
    # the mean over pairs of different rows; equal rows have distance 0 and no scale
    scale = (squared.detach().sum() / max(1, len(x) * (len(x) - 1))).clamp(min=1e-12)
    return gaussians(squared, [2 * factor * scale for factor in factors])


def joint_mmd(
    xs: Sequence[Tensor], ys: Sequence[Tensor], kernels: Sequence[Callable[[Tensor], Tensor]] | None = None
) -> Tensor:
    """Computes the squared joint maximum mean discrepancy of several layers, by multiplying their kernels (JAN).

    Args:
        xs: A sample's activations in each layer, (N, D_l).
        ys: Another sample's, (M, D_l).
        kernels: The kernel of each layer, (N + M, D_l) -> (N + M, N + M); None uses `gaussian_kernel` for all.

    Returns:
        `mean K(x, x) + mean K(y, y) - 2 mean K(x, y)`, a scalar that is never negative and 0 for equal samples.
    """
    layers = [torch.cat([x, y]) for x, y in zip(xs, ys, strict=True)]
    product = torch.stack(
        [of(z) for of, z in zip(kernels or [gaussian_kernel] * len(layers), layers, strict=True)]
    ).prod(0)
    n = len(xs[0])
    return product[:n, :n].mean() + product[n:, n:].mean() - 2 * product[:n, n:].mean()


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """Computes the squared maximum mean discrepancy with several Gaussian kernels (Gretton et al., JMLR 2012; DAN)."""
    return joint_mmd([x], [y])


def covariance(x: Tensor) -> Tensor:
    """Computes the covariance, (N, D) -> (D, D), divided by N - 1."""
    centred = x - x.mean(0)
    return centred.T @ centred / max(1, len(x) - 1)


def relative_coral(x: Tensor, y: Tensor, mean: bool = False) -> Tensor:
    """Computes `||C_x - C_y||_F^2 / (||C_x||_F^2 + ||C_y||_F^2)`: 0 for equal covariances, at most 1, at any scale.

    Args:
        x: (N, D).
        y: (M, D).
        mean: Adds `||m_x - m_y||^2 / (tr C_x + tr C_y)`.
    """
    one, other = covariance(x), covariance(y)
    tiny = torch.finfo(x.dtype).tiny  # for constant features
    distance = (one - other).square().sum() / (one.square().sum() + other.square().sum()).clamp(min=tiny)
    if mean:
        spread = (one.trace() + other.trace()).clamp(min=tiny)
        distance = distance + (x.mean(0) - y.mean(0)).square().sum() / spread
    return distance


def sliced_wasserstein(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """Computes the squared sliced Wasserstein-2 distance: the mean over directions of the cost after sorting.

    Args:
        x: (N, D).
        y: (M, D).
        directions: (D, P), columns of length 1.
    """
    x, y = (x @ directions).sort(0).values, (y @ directions).sort(0).values
    if len(x) != len(y):
        # both quantile functions are constant between the steps of either
        n, m = len(x), len(y)
        steps = torch.unique(torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]))
        widths = torch.diff(steps, prepend=steps.new_zeros(1)).to(x) / (n * m)
        x, y = x[((steps - 1) // m).to(x.device)], y[((steps - 1) // n).to(y.device)]
        return ((x - y).square() * widths[:, None]).sum(0).mean()
    return (x - y).square().mean()


# Class probabilities


def entropy(p: Tensor) -> Tensor:
    """Computes `-sum_c p_c log p_c` of each row, (B, C) -> (B,)."""
    return cast(Tensor, torch.special.entr(p).sum(1))


def mutual_information(p: Tensor) -> Tensor:
    """Computes the mutual information of input and class, `H(mean p) - mean H(p)`: confident and diverse."""
    return entropy(p.mean(0, keepdim=True)).squeeze(0) - entropy(p).mean()


def certainty_weights(p: Tensor) -> Tensor:
    """Computes `1 + exp(-H(p))`, scaled to mean 1 and detached, (B, C) -> (B,): used by CDAN+E and MCC."""
    weights = 1 + torch.exp(-entropy(p.detach()))
    return weights / weights.mean()


def class_confusion(logits: Tensor, temperature: float = 2.5) -> Tensor:
    """Computes how much the classes are confused with one another (Jin et al., MCC, ECCV 2020), (B, C) -> scalar.

    `P = softmax(logits / T)`, `K = P^T diag(w) P` with w the certainty weights, each row of K scaled to sum 1; the
    result is the mean over the classes of the off-diagonal sum.
    """
    p = (logits / temperature).softmax(1)
    confusion = (p * certainty_weights(p)[:, None]).T @ p
    confusion = confusion / confusion.sum(1, keepdim=True)
    return (confusion.sum() - confusion.trace()) / len(confusion)


def nuclear_norm(p: Tensor) -> Tensor:
    """Computes `||P||_* / B`, the sum of singular values: large if P is confident and diverse (Cui et al., BNM)."""
    return cast(Tensor, torch.linalg.matrix_norm(p, "nuc") / len(p))


def soft_cross_entropy(logits: Tensor, p: Tensor) -> Tensor:
    """Computes `-sum_c p_c log softmax(logits)_c` of each row, (B,)."""
    return -(p * logits.log_softmax(1)).sum(1)


# Distillation


def tempered_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Computes `T^2 mean KL(softmax(teacher / T) || softmax(student / T))` of logits (Hinton et al., 2015).

    T^2 keeps the size of the gradient independent of the temperature.
    """
    return temperature**2 * _divergence(student / temperature, teacher / temperature)


def decoupled_divergence(
    student: Tensor, teacher: Tensor, y: Tensor, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
) -> Tensor:
    """Computes the divergence in two parts with separate weights (Zhao et al., DKD, CVPR 2022).

    `T^2 (alpha KL of (p_y, 1 - p_y) + beta KL of the probabilities among the other classes)`.

    Args:
        student: Logits.
        teacher: Logits.
        y: Class numbers (B,).
        alpha: Weight of the first part.
        beta: Weight of the second part, which is 0 if there are only two classes.
        temperature: T.
    """
    one = F.one_hot(y, student.shape[1]).bool()
    binary, others = [], []
    for logits in (student / temperature, teacher / temperature):
        rest = logits[~one].view(len(logits), -1)
        binary.append(torch.stack([logits[one], rest.logsumexp(1)], 1))
        others.append(rest)
    return temperature**2 * (alpha * _divergence(*binary) + beta * _divergence(*others))


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


def correlation_distance(x: Tensor, y: Tensor) -> Tensor:
    """Computes `mean (1 - r(x_i, y_i))` with Pearson's r of rows, (N, D) each; r of a constant row is 0."""
    x, y = (each - each.mean(1, keepdim=True) for each in (x, y))
    return 1 - F.cosine_similarity(x, y, dim=1).mean()


def energy(maps: Tensor) -> Tensor:
    """Computes `mean_c x_c^2` at each position, (B, C, *positions) -> (B, *positions): where a network looks."""
    return maps.square().mean(1)


def attention_distance(x: Tensor, y: Tensor) -> Tensor:
    """Computes the mean squared difference of energies (B, *positions), normalised by sample (Zagoruyko, Komodakis)."""
    one, other = (F.normalize(each.flatten(1)) for each in smaller(x[:, None], y[:, None]))
    return F.mse_loss(one, other)


def smaller(x: Tensor, y: Tensor) -> list[Tensor]:
    """Averages maps (B, C, *positions) over regions, so that both have as many positions as the smaller one."""
    size = [min(one, other) for one, other in zip(x.shape[2:], y.shape[2:], strict=True)]
    pool: Any = F.adaptive_avg_pool1d if len(size) == 1 else F.adaptive_avg_pool2d
    return [each if list(each.shape[2:]) == size else pool(each, size) for each in (x, y)]


def relative_distances(x: Tensor) -> Tensor:
    """Computes `||x_i - x_j||` divided by its mean over the pairs, (N, D) -> (N, N)."""
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / max(1, len(x) * (len(x) - 1))
    return distances / mean.clamp(min=1e-12)


def angles(x: Tensor) -> Tensor:
    """Computes cosines of the angles at x_i between x_j and x_k, (N, D) -> (N, N, N); 0 if two points coincide."""
    directions = F.normalize(x[None] - x[:, None], dim=2)
    return directions @ directions.transpose(1, 2)


# Closed-form heads

MOST = 4_000_000_000  # entries in all classes' covariances; more would take minutes


def discriminant(features: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor] | None:
    """Fits linear discriminant analysis with Ledoit-Wolf shrinkage of each class's covariance (scikit-learn's `lsqr`).

    Args:
        features: (N, D).
        y: Class numbers (N,).
        classes: C; a class without samples is never predicted.

    Returns:
        Weight (C, D) and bias (C,) of the log posteriors; None if fewer than two classes have samples, no class has
        two, features are not finite, or it would take minutes.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    there = torch.unique(y)
    if not 2 <= len(there) < len(y) or not features.isfinite().all() or len(there) * features.shape[1] ** 2 > MOST:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about constant columns
        fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(features.double().numpy(), y.numpy())
    rows, biases = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
    if len(there) == 2:  # with two classes scikit-learn returns their difference
        rows, biases = (torch.cat([-half, half]) for half in (rows / 2, biases / 2))
    weight, bias = rows.new_zeros(classes, features.shape[1]), biases.new_full((classes,), float(biases.min()) - 10)
    weight[there], bias[there] = rows, biases
    return weight.float(), bias.float()


def ridge(features: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
    """Fits ridge regression, with the penalty chosen by leave-one-out errors from 0.01 to 10,000.

    Args:
        features: (N, D).
        y: Values (N,) or (N, K).

    Returns:
        Weight (K, D) and bias (K,); None for fewer than two samples, or features that are not finite.
    """
    from sklearn.linear_model import RidgeCV

    if len(y) < 2 or not features.isfinite().all():
        return None
    values = y.view(len(y), -1).double()
    fitted = RidgeCV(alphas=[10.0**n for n in range(-2, 5)]).fit(features.double().numpy(), values.numpy())
    weight, bias = (torch.from_numpy(np.atleast_1d(part)).float() for part in (fitted.coef_, fitted.intercept_))
    return weight.view(values.shape[1], -1), bias


# Augmentation of batches


def strong_augment(x: Any, strength: float = 1.0) -> Tensor:
    """Augments each sample of a batch strongly without changing its class; draws from torch's generator.

    Args:
        x: Images (B, C, H, W), uint8 or floats in [0, 1], or vectors (B, D).
        strength: 0 changes nothing; 1 rotates by up to 20 degrees, translates by up to 15 %, scales and shears by up to
            15 %, changes brightness and contrast by up to 50 %, inverts one in five and masks a quarter of the side;
            vectors get noise of a fifth of the batch's deviation, and a tenth of their values are replaced by its mean.

    Returns:
        The same shape, as floats.

    Raises:
        UserError: The inputs are something else, e.g. texts.
    """
    if not isinstance(x, Tensor) or not (x.ndim == 4 or (x.ndim == 2 and x.is_floating_point())):
        what = f"tensors {tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise UserError(f"methods: strong augmentation (FixMatch, MeanTeacher) takes images or vectors, not {what}")
    if x.ndim == 2:
        noisy = x + 0.2 * strength * x.std(0, unbiased=False) * torch.randn_like(x)
        return torch.where(torch.rand_like(x) < 0.1 * strength, x.mean(0), noisy)
    y = x.float() / 255 if x.dtype == torch.uint8 else x

    def uniform(*shape: int) -> Tensor:
        return strength * (2 * torch.rand(len(x), *shape, device=x.device) - 1)

    angle, scale = uniform() * math.radians(20), 1 + 0.15 * uniform()
    cos, sin, shear = angle.cos() * scale, angle.sin() * scale, 0.15 * uniform()
    shift = 0.3 * uniform(2)  # in coordinates from -1 to 1
    theta = torch.stack([torch.stack([cos, shear - sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    y = F.grid_sample(
        y, F.affine_grid(theta, list(y.shape), align_corners=False), padding_mode="reflection", align_corners=False
    )
    mean = y.mean((1, 2, 3), keepdim=True)
    y = ((y - mean) * (1 + 0.5 * uniform(1, 1, 1)) + mean * (1 + 0.5 * uniform(1, 1, 1))).clamp(0, 1)
    y = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.2 * strength, 1 - y, y)
    height, width = y.shape[2:]
    centre = torch.rand(len(x), 2, 1, 1, device=x.device)
    rows = (torch.arange(height, device=x.device).view(-1, 1) / height - centre[:, 0]).abs() < strength / 8
    columns = (torch.arange(width, device=x.device) / width - centre[:, 1]).abs() < strength / 8
    return torch.where((rows & columns)[:, None], mean, y)
