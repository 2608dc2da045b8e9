"""Pretraining by comparing views of a sample: SimCLR, VICReg and DINO with lightly's losses, and SCARF for rows."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tl_modules.backbones.base import Backbone
from tl_modules.batch import samples
from tl_modules.batch.output import full_precision
from tl_modules.errors import UserError
from tl_modules.pretraining.base import Pretraining, input_kind
from tl_modules.pretraining.layers import projector
from tl_modules.pretraining.reconstruction import swap

__all__ = ["DINO", "SCARF", "SimCLR", "VICReg"]


class Compared(Pretraining):
    """Compares two views of each sample with a loss of lightly, `criterion`."""

    views: ClassVar[int] = 2
    criterion: Any

    def objective(self, *views: Any) -> dict[str, Tensor]:
        """Computes the loss of the two views' projections."""
        self.criterion.gather_distributed = self.training  # batches of an evaluation differ in size
        return {"views": self.criterion(*self.project(views))}


class SimCLR(Compared):
    """Identifies a sample's other view among all views of the batch (Chen et al., ICML 2020).

    `-log exp(cos(z_i, z_j) / T) / sum_(k != i) exp(cos(z_i, z_k) / T)`, the mean over the 2 B views i, with j the other
    view of the same sample; z is a projection of the features. lightly's `NTXentLoss`; over several processes all their
    views are compared. Larger batches have more negatives.

    Args:
        backbone: Maps raw samples to features.
        temperature: T; in the paper 0.5 for small images, 0.1 for ImageNet.
        hidden: Width of the projection's hidden layer; None takes that of the features, as in the paper.
        dim: Width of z.
        **kwargs: As for `Pretraining`.
    """

    def __init__(
        self, backbone: Backbone, temperature: float = 0.5, hidden: int | None = None, dim: int = 128, **kwargs: Any
    ) -> None:
        def head(width: int) -> nn.Module:
            return projector([width, hidden or width, dim], last_norm=True)

        super().__init__(backbone, head=head, **kwargs)
        if temperature <= 0:
            raise UserError(f"temperature: {temperature} must be above 0")
        self.criterion = lightly_loss(self, "NTXentLoss", temperature=temperature, gather_distributed=True)


class VICReg(Compared):
    """Makes two views agree, without collapsed or redundant dimensions (Bardes, Ponce and LeCun, ICLR 2022).

    `invariance |z - z'|^2 / dim + variance mean_d max(0, 1 - std z_d) + covariance sum_(c != d) C_cd^2 / dim`, as
    lightly's `VICRegLoss`; z is an expansion of the features, C its covariance over the batch.

    Args:
        backbone: Maps raw samples to features.
        invariance: Weight of the first part; 25 in the paper, like the next.
        variance: Weight of the second part.
        covariance: Weight of the third part.
        dim: Width of z and of the two layers before it; in the paper 8192 for a ResNet-50, four times its features.
        **kwargs: As for `Pretraining`.
    """

    def __init__(
        self,
        backbone: Backbone,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        dim: int = 512,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, head=lambda width: projector([width, dim, dim, dim]), **kwargs)
        weights = {"lambda_param": invariance, "mu_param": variance, "nu_param": covariance}
        self.criterion = lightly_loss(self, "VICRegLoss", **weights, gather_distributed=True)


class DINO(Pretraining):
    """Predicts for a view what an average of past weights predicts for the other view (Caron et al., ICCV 2021).

    `-sum_k q_k log p_k` with p the softmax of the student's outputs at temperature 0.1, and q that of the teacher's,
    minus their running mean, at `teacher_temperature`; lightly's `DINOLoss`, with two views and no small crops. The
    teacher's momentum rises to 1 along a cosine. The student is kept and transferred.

    Args:
        backbone: Maps raw samples to features.
        dim: Number of outputs; 65,536 in the paper for ImageNet.
        hidden: Width of the head's two hidden layers.
        bottleneck_dim: Width of the normalised layer before the last one.
        momentum: Initial momentum of the teacher; 0.996 in the paper, lower for short runs.
        teacher_temperature: Temperature of the teacher.
        **kwargs: As for `Pretraining`.
    """

    views: ClassVar[int] = 2

    def __init__(
        self,
        backbone: Backbone,
        dim: int = 1024,
        hidden: int = 512,
        bottleneck_dim: int = 128,
        momentum: float = 0.99,
        teacher_temperature: float = 0.04,
        **kwargs: Any,
    ) -> None:
        def head(width: int) -> nn.Module:
            return PrototypeHead([width, hidden, hidden, bottleneck_dim], dim)

        super().__init__(backbone, head=head, **kwargs)
        if not 0 <= momentum <= 1:
            raise UserError(f"momentum: {momentum} must be in [0, 1]")
        self.momentum, self.teacher_temperature = momentum, teacher_temperature
        self.criterion = lightly_loss(self, "DINOLoss", output_dim=dim, teacher_temp=teacher_temperature)
        self.teacher = copy.deepcopy(self._student()).requires_grad_(False)

    def _student(self) -> nn.ModuleList:
        return nn.ModuleList([self.backbone, self.head])

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Updates the teacher's weights towards the student's."""
        momentum = 1 - (1 - self.momentum) * (math.cos(math.pi * self.progress) + 1) / 2
        for mine, students in zip(self.teacher.parameters(), self._student().parameters(), strict=True):
            mine.lerp_(students, 1 - momentum)

    def objective(self, *views: Any) -> dict[str, Tensor]:
        """Computes the cross-entropy of each view with the teacher's output for the other."""
        if self.training:
            self.update_teacher()
        backbone, head = cast(Any, self.teacher)
        with torch.no_grad():
            features = backbone.pooled_features(backbone(samples.concat(list(views))))
            with full_precision(self.device):
                taught = head(samples.to_float32(features)).chunk(len(views))
        center = self.criterion.center.clone()
        loss = self.criterion(list(taught), self.project(views), teacher_temp=self.teacher_temperature)
        if not self.training:  # evaluation updates nothing
            self.criterion.center.copy_(center)
        return {"dino": loss}


class PrototypeHead(nn.Module):
    """DINO's head: an MLP with GELU, then the cosines with `outputs` learnt directions.

    Args:
        widths: Widths of the input, the hidden layers and the normalised layer.
        outputs: Number of directions.
    """

    def __init__(self, widths: list[int], outputs: int) -> None:
        super().__init__()
        self.layers = projector(widths, activation=nn.GELU)
        self.directions = nn.Parameter(nn.init.trunc_normal_(torch.empty(outputs, widths[-1]), std=0.02))

    def forward(self, features: Tensor) -> Tensor:
        """Maps (B, D) to cosines (B, outputs)."""
        return F.linear(F.normalize(self.layers(features)), F.normalize(self.directions))


class SCARF(Pretraining):
    """Identifies a row among copies of the batch's rows with most values replaced (Bahri et al., ICLR 2022).

    `-log exp(cos(z_i, z'_i) / T) / sum_k exp(cos(z_i, z'_k) / T)`, the mean over the rows i; z' is from a copy whose
    values were replaced, each with probability `corruption`, by those of other rows in the same column.

    Args:
        backbone: Maps raw samples to features.
        corruption: Share of the values that are replaced; 0.6 in the paper.
        temperature: T; 1 in the paper.
        dim: Width of z and of the layer before it; 256 in the paper.
        **kwargs: As for `Pretraining`.
    """

    def __init__(
        self, backbone: Backbone, corruption: float = 0.6, temperature: float = 1.0, dim: int = 256, **kwargs: Any
    ) -> None:
        super().__init__(backbone, head=lambda width: projector([width, dim, dim]), **kwargs)
        if not 0 < corruption < 1:
            raise UserError(f"corruption: {corruption} must be between 0 and 1")
        if temperature <= 0:
            raise UserError(f"temperature: {temperature} must be above 0")
        if input_kind(self.backbone, self.schema) != "numeric":
            raise UserError("model: SCARF swaps values of columns, so it takes rows of numbers; for images use SimCLR")
        self.corruption, self.temperature = corruption, temperature

    def objective(self, *views: Any) -> dict[str, Tensor]:
        """Computes the contrastive loss of the rows and their corrupted copies."""
        (x,) = views
        parts = x if isinstance(x, dict) else {"": x}
        swapped = {name: swap(part, self.corruption)[0] for name, part in parts.items()}
        z, other = (F.normalize(each) for each in self.project([x, swapped if isinstance(x, dict) else swapped[""]]))
        return {"contrast": F.cross_entropy(z @ other.T / self.temperature, torch.arange(len(z), device=z.device))}


def lightly_loss(module: Pretraining, name: str, **options: Any) -> Any:
    """Builds a loss of lightly.

    Raises:
        UserError: lightly is not installed.
    """
    try:
        from lightly import loss
    except ImportError as error:
        raise UserError(f"{type(module).__name__} needs lightly: pip install 'lightning-transfer[ssl]'") from error
    return getattr(loss, name)(**options)
