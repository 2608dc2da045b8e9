"""Task heads: features (B, in_features) -> outputs (B, out_features)."""

from __future__ import annotations

from abc import ABC
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tl_modules.errors import UserError

__all__ = ["Bottleneck", "CosineHead", "Head", "LinearHead", "MLPHead"]


class Head(nn.Module, ABC):
    """Maps features (B, in_features) to outputs (B, out_features).

    A subclass takes (in_features, out_features, ...) and writes `forward`.
    """


Head.register(nn.Linear)  # what runs of version 0.1 name


class LinearHead(Head, nn.Sequential):
    """A linear layer on normalised features.

    LayerNorm gives the features of any backbone one scale, so that one learning rate fits them all. The weights start
    near zero.

    Args:
        in_features: Width of the features.
        out_features: Number of outputs.
        closed_form: Whether a run on a frozen pretrained backbone begins with the weights that shrinkage discriminant
            analysis (classes) or ridge regression (values) gives on its features, rather than near zero.

    Attributes:
        closed_form: The same; False once the head has weights.
    """

    def __init__(self, in_features: int, out_features: int, closed_form: bool = True) -> None:
        last = nn.Linear(in_features, out_features)
        # so small that a short run has no noise to unlearn, and passes none on to the backbone
        nn.init.normal_(last.weight, std=1e-3)
        nn.init.zeros_(last.bias)
        super().__init__(nn.LayerNorm(in_features), last)
        self.closed_form = closed_form
        self.register_load_state_dict_post_hook(self._has_weights)  # type: ignore[no-untyped-call]

    def _has_weights(self, *_: Any) -> None:
        self.closed_form = False


class MLPHead(Head, nn.Sequential):
    """Linear, BatchNorm if asked for, ReLU, dropout, linear; on normalised features.

    Args:
        in_features: Width of the features.
        out_features: Number of outputs.
        hidden: Width between the two layers.
        dropout: Probability of dropping a hidden unit.
        batch_norm: Normalises the hidden units.
        normalize: Gives the features one scale by LayerNorm.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: int = 256,
        dropout: float = 0.0,
        batch_norm: bool = False,
        normalize: bool = True,
    ) -> None:
        before = [nn.LayerNorm(in_features)] if normalize else []
        norm = [nn.BatchNorm1d(hidden)] if batch_norm else []
        super().__init__(
            *before,
            nn.Linear(in_features, hidden),
            *norm,
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, out_features),
        )


class Bottleneck(nn.Sequential):
    """A layer of its own between features and head, for methods to move: Linear, BatchNorm, ReLU.

    Args:
        in_features: Width of the features.
        width: Of what it gives.

    Raises:
        UserError: The width is not positive.
    """

    def __init__(self, in_features: int, width: int) -> None:
        if width < 1:
            raise UserError(f"bottleneck: {width} must be at least 1")
        super().__init__(nn.Linear(in_features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())


class CosineHead(Head):
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
