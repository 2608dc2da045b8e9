"""A network for rows of numbers.

(B, D) -> standardise -> [Linear, BatchNorm, ReLU] of stage 0 -> stage 1 -> ... -> (B, out_features)
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from tl_modules.backbones.base import Backbone, Weights
from tl_modules.errors import UserError

__all__ = ["VectorBackbone"]


class VectorBackbone(Backbone):
    """Dense layers on standardised rows; one stage for each width.

    Mean and deviation of each column are running statistics in the model, so that a checkpoint takes rows in their
    units. They belong to the first stage and rest where it is closed; where it trains, they are those of the present
    run's rows, also after pretrained weights were loaded.

    Args:
        in_features: D, the number of columns; `tl fit` takes it from the data's `in_features`.
        widths: Of each stage; [] leaves the standardised columns as they are.
        dropout: Share of each stage's outputs that is dropped in training.
        weights: A local file or a run of ours; None starts at random.
        strict: Refuse weights that lack a tensor or have one of another shape.

    Raises:
        UserError: The number of columns is not known, a width is not positive, or the weights do not fit.
    """

    def __init__(
        self,
        in_features: int | None = None,
        widths: list[int] = [64, 64],  # noqa: B006 - what the help shows
        dropout: float = 0.0,
        weights: Weights = None,
        strict: bool = True,
    ) -> None:
        super().__init__()
        if in_features is None:
            raise UserError("in_features: the data do not say how many columns they have; VectorBackbone takes Tables")
        if min([in_features, *widths]) < 1:
            raise UserError(f"in_features, widths: {in_features} and {widths} must be at least 1 each")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout: {dropout} must lie in [0, 1)")
        # momentum None: the average over all batches, so that columns of any scale are right from the first step on
        standardise = nn.BatchNorm1d(in_features, affine=False, momentum=None)
        stages: list[list[nn.Module]] = [[standardise]]
        for inputs, outputs in pairwise([in_features, *widths]):
            dense = [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(), nn.Dropout(dropout)]
            stages.append(dense)
        # it has no parameters, and rests and moves with the first stage
        stages[:2] = [[layer for stage in stages[:2] for layer in stage]]
        self.model = nn.Sequential(*(nn.Sequential(*stage) for stage in stages))
        self.in_features, self.out_features = in_features, [in_features, *widths][-1]
        self.load_pretrained(weights, strict)
        assert standardise.num_batches_tracked is not None
        standardise.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_features) -> (B, out_features)."""
        features: Tensor = self.model(x)
        return features

    def stages(self) -> list[nn.Module]:
        """One for each width."""
        return list(self.model.children())
