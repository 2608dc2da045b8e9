"""Dense networks for rows of tables.

x -> columns (columns.py) -> [Linear, BatchNorm, ReLU] of stage 0 -> stage 1 -> ... -> (B, out_features)
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from tl_modules.backbones.base import PretrainedWeights
from tl_modules.backbones.columns import MixedColumns, Scale, Standardise, TabularBackbone
from tl_modules.errors import UserError

__all__ = ["TabularMLP"]


class TabularMLP(TabularBackbone):
    """Dense layers on standardised numbers and one-hot categories; one stage per width.

    Mean and deviation of each column are running statistics in the model, so that a checkpoint takes rows in their
    original units. They belong to the first stage and are frozen with it; while it trains, they are those of the
    current run's rows, even after pretrained weights were loaded.

    Args:
        in_features: D, the number of columns; None takes it from the data's schema.
        widths: Width of each stage; [] returns the standardised columns. None: [256, 256], or [256] if all columns have
            one unit, since the network that they come from already has layers.
        dropout: Share of each stage's outputs that is dropped in training.
        weights: A local file or a run of `tl fit`; None starts at random.
        strict: Rejects weights that lack a tensor, have one of another shape, or have further blocks.
        scale: "each" divides a column by its own standard deviation, "all" divides all by one number, which preserves
            the relative size of a network's channels. None: "all" if the data says that its columns have one unit, as
            `TabularData` does for arrays and for features of `tl embed`; else "each".
        clip: With "each", clips values to this many standard deviations; None: no clipping.
        embedding: Width of each number's embedding by periodic functions, see `MixedColumns`; 0: none.

    Raises:
        UserError: A width or `clip` is not positive, or the weights do not fit.
    """

    decided_by_schema = ("scale", "widths")

    def __init__(
        self,
        in_features: int | None = None,
        widths: list[int] | None = None,
        dropout: float = 0.0,
        weights: PretrainedWeights = None,
        strict: bool = True,
        scale: Scale | None = None,
        clip: float | None = 5.0,
        embedding: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise UserError(f"dropout: {dropout} must be in [0, 1)")
        if clip is not None and clip <= 0:
            raise UserError(f"clip: {clip:g} must be above 0, or null")
        if embedding < 0:
            raise UserError(f"embedding: {embedding} must not be negative")
        self.clip, self.embedding = clip, embedding
        self.widths, self.scale, self.dropout, self.weights, self.strict = widths, scale, dropout, weights, strict
        if in_features is not None:
            self.build(in_features, [])

    def layers(self, numeric: int, categories: list[int]) -> nn.Module:
        """Builds a stage for each width, the first with the columns."""
        if self.widths is None:
            self.widths = [256] if self.scale == "all" else [256, 256]
        columns: Any = Standardise(numeric, self.scale or "each", self.clip)
        inputs = numeric
        if categories or self.embedding:
            columns = MixedColumns(numeric, categories, self.scale or "each", self.clip, self.embedding)
            inputs = columns.out_features
        if min([inputs, *self.widths]) < 1:
            raise UserError(f"in_features, widths: {inputs} and {self.widths} must be at least 1 each")
        stages: list[list[nn.Module]] = [[columns]]
        for width, outputs in pairwise([inputs, *self.widths]):
            norm, dropout = nn.BatchNorm1d(outputs), nn.Dropout(self.dropout)
            stages.append([nn.Linear(width, outputs, bias=False), norm, nn.ReLU(), dropout])
        # the columns freeze and train with the first stage
        stages[:2] = [[layer for stage in stages[:2] for layer in stage]]
        self.out_features = [inputs, *self.widths][-1]
        return nn.Sequential(*(nn.Sequential(*stage) for stage in stages))

    def forward(self, x: Any) -> Tensor:
        """Maps (B, in_features), or with categories {"numeric", "categorical"}, to (B, out_features)."""
        features: Tensor = self.model(x)
        return features

    def stages(self) -> list[nn.Module]:
        """Returns one stage per width."""
        return list(self.model.children())
