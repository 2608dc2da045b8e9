"""Task heads: features (B, in_features) -> outputs (B, out_features). `torch.nn.Linear` is the default one."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class MLPHead(nn.Sequential):
    """Linear, BatchNorm if asked for, ReLU, dropout, linear.

    Args:
        in_features: Width of the features.
        out_features: Number of outputs.
        hidden: Width between the two layers.
        dropout: Probability of dropping a hidden unit.
        batch_norm: Normalises the hidden units.
    """

    def __init__(
        self, in_features: int, out_features: int, hidden: int = 256, dropout: float = 0.0, batch_norm: bool = False
    ) -> None:
        norm = [nn.BatchNorm1d(hidden)] if batch_norm else []
        super().__init__(
            nn.Linear(in_features, hidden), *norm, nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, out_features)
        )


class CosineHead(nn.Module):
    """`scale * cos(features, prototype)` for each output, as in Gidaris and Komodakis (CVPR 2018) for few shots.

    Args:
        in_features: Width of the features.
        out_features: Number of outputs.
        scale: Starting value of the learned temperature.
    """

    def __init__(self, in_features: int, out_features: int, scale: float = 10.0) -> None:
        super().__init__()
        self.prototypes = nn.Linear(in_features, out_features, bias=False)
        self.scale = nn.Parameter(self.prototypes.weight.new_tensor(scale))

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_features) -> (B, out_features)."""
        return self.scale * F.linear(F.normalize(features), F.normalize(self.prototypes.weight))
