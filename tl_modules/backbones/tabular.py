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

__all__ = ["TabularMLP", "VectorBackbone"]


class TabularMLP(TabularBackbone):
    """Dense layers on standardised numbers and marked categories; one stage for each width.

    Mean and deviation of each column are running statistics in the model, so that a checkpoint takes rows in their
    units. They belong to the first stage and rest where it is closed; where it trains, they are those of the present
    run's rows, also after pretrained weights were loaded.

    Args:
        in_features: D, the number of columns; None takes it from the data's schema.
        widths: Of each stage; [] leaves the standardised columns as they are. None: [256, 256], and [256] where all
            columns have one scale, since the network that they come from has layers of its own.
        dropout: Share of each stage's outputs that is dropped in training.
        weights: A local file or a run of ours; None starts at random.
        strict: Refuse weights that lack a tensor or have one of another shape.
        scale: "each" column is divided by its own deviation, or "all" by one number, which keeps what the channels of
            a network say by their size. None: "all" where the data says that its columns have one unit, as
            `TabularData` does of arrays and of what `tl embed` wrote; else "each".
        clip: Of a column that is divided by its own deviation, how many of them a value keeps at most; None: all.
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
            raise UserError(f"dropout: {dropout} must lie in [0, 1)")
        if clip is not None and clip <= 0:
            raise UserError(f"clip: {clip:g} must be above 0, or null")
        if embedding < 0:
            raise UserError(f"embedding: {embedding} must not be negative")
        self.clip, self.embedding = clip, embedding
        self.widths, self.scale, self.dropout, self.weights, self.strict = widths, scale, dropout, weights, strict
        if in_features is not None:
            self.build(in_features, [])

    def layers(self, numeric: int, categories: list[int]) -> nn.Module:
        """A stage for each width, the first with the columns."""
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
        # the columns rest and move with the first stage
        stages[:2] = [[layer for stage in stages[:2] for layer in stage]]
        self.out_features = [inputs, *self.widths][-1]
        return nn.Sequential(*(nn.Sequential(*stage) for stage in stages))

    def forward(self, x: Any) -> Tensor:
        """(B, in_features), or with categories {"numeric", "categorical"} -> (B, out_features)."""
        features: Tensor = self.model(x)
        return features

    def stages(self) -> list[nn.Module]:
        """One for each width."""
        return list(self.model.children())


VectorBackbone = TabularMLP  # earlier name, which a config may hold
