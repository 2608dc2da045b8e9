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

    A subclass takes (in_features, out_features, ...) and implements `forward`.
    """


Head.register(nn.Linear)  # the head in configs of version 0.1


class LinearHead(Head, nn.Sequential):
    """A linear layer on normalised features.

    LayerNorm scales the features of any backbone alike, so that one learning rate suits them all. The weights start
    near zero.

    Args:
        in_features: Width of the features.
        out_features: Number of outputs.
        closed_form: Whether a run on a frozen pretrained backbone starts from the weights that shrinkage discriminant
            analysis (classes) or ridge regression (values) computes from its features, instead of near zero.

    Attributes:
        closed_form: As the argument; False once the head has weights.
    """

    def __init__(self, in_features: int, out_features: int, closed_form: bool = True) -> None:
        last = nn.Linear(in_features, out_features)
        # small enough that a short run has no noise to unlearn, and propagates none to the backbone
        nn.init.normal_(last.weight, std=1e-3)
        nn.init.zeros_(last.bias)
        super().__init__(nn.LayerNorm(in_features), last)
        self.closed_form = closed_form
        self.register_load_state_dict_post_hook(self._has_weights)  # type: ignore[no-untyped-call]

    def _has_weights(self, *_: Any) -> None:
        self.closed_form = False


class MLPHead(Head, nn.Sequential):
    """Normalises features, then applies linear, optional BatchNorm, ReLU, dropout, linear.

    Args:
        in_features: Width of the features.
        out_features: Number of outputs.
        hidden: Width between the two layers.
        dropout: Probability of dropping a hidden unit.
        batch_norm: Normalises the hidden units.
        normalize: Applies LayerNorm to the features.
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
    """A trainable layer between features and head, which methods can adapt: Linear, BatchNorm, ReLU.

    Args:
        in_features: Width of the features.
        width: Width of its output.

    Raises:
        UserError: The width is not positive.
    """

    def __init__(self, in_features: int, width: int) -> None:
        if width < 1:
            raise UserError(f"bottleneck: {width} must be at least 1")
        super().__init__(nn.Linear(in_features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())


class CosineHead(Head):
    """Computes `scale * cos(features, prototype)` per output, for few shots (Gidaris and Komodakis, CVPR 2018).

    Args:
        in_features: Width of the features.
        out_features: Number of outputs.
        scale: Initial value of the learned temperature.
    """

    def __init__(self, in_features: int, out_features: int, scale: float = 10.0) -> None:
        super().__init__()
        self.prototypes = nn.Linear(in_features, out_features, bias=False)
        self.scale = nn.Parameter(self.prototypes.weight.new_tensor(scale))

    def forward(self, features: Tensor) -> Tensor:
        """Maps (B, in_features) to (B, out_features)."""
        return self.scale * F.linear(F.normalize(features), F.normalize(self.prototypes.weight))
