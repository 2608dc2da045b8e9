"""A network for rows of numbers.

(B, D) -> Standardise -> [Linear, BatchNorm, ReLU] of stage 0 -> stage 1 -> ... -> (B, out_features)
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal, cast

from torch import Tensor, nn

from tl_modules.backbones.base import Backbone, PretrainedWeights
from tl_modules.errors import UserError

__all__ = ["TabularMLP", "VectorBackbone"]

Scale = Literal["each", "all"]


class Standardise(nn.BatchNorm1d):
    """Subtracts each column's mean, and divides by its deviation or by one number for all columns, (B, D) -> (B, D).

    Args:
        columns: D.
        scale: "each": a column's own deviation. "all": the root of the columns' mean variance.
        clip: With "each", how many deviations a value keeps at most; a column that hardly ever moves in training may
            reach thousands in another domain. None: as many as it has.
    """

    def __init__(self, columns: int, scale: Scale, clip: float | None) -> None:
        # momentum None: the average over all batches, so that columns of any scale are right from the first step on
        super().__init__(columns, affine=False, momentum=None)
        self.scale, self.clip = scale, clip

    def forward(self, input: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        each = super().forward(input)
        if self.scale == "each":
            return each if self.clip is None else each.clamp(-self.clip, self.clip)
        if self.training or self.running_mean is None or self.running_var is None:
            mean, variance = input.mean(0), input.var(0, unbiased=False)
        else:
            mean, variance = self.running_mean, self.running_var
        return (input - mean) / (variance.mean() + self.eps).sqrt()


class TabularMLP(Backbone):
    """Dense layers on standardised rows; one stage for each width.

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
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise UserError(f"dropout: {dropout} must lie in [0, 1)")
        if clip is not None and clip <= 0:
            raise UserError(f"clip: {clip:g} must be above 0, or null")
        self.clip = clip
        self.widths, self.scale, self.dropout, self.weights, self.strict = widths, scale, dropout, weights, strict
        if in_features is not None:
            self._build(in_features)

    def bind_schema(self, x: Mapping[str, Any]) -> None:
        """Builds the layers for the data's columns.

        Raises:
            UserError: The data does not say how many there are, or has another number than the layers.
        """
        columns = len(x["numeric"]) if "numeric" in x else None
        if self.scale is None:
            self.scale = "all" if x.get("one_unit") else "each"
            if hasattr(self, "in_features"):
                cast(Standardise, self.model.get_submodule("0.0")).scale = self.scale
        if columns is None and not hasattr(self, "in_features"):
            raise UserError("in_features: the data does not say how many columns it has; TabularMLP takes TabularData")
        if not hasattr(self, "in_features"):
            self._build(cast(int, columns))
        elif columns not in (None, self.in_features):
            raise UserError(f"in_features: {self.in_features} for data with {columns} columns")

    def _build(self, in_features: int) -> None:
        if self.widths is None:
            self.widths = [256] if self.scale == "all" else [256, 256]
        if min([in_features, *self.widths]) < 1:
            raise UserError(f"in_features, widths: {in_features} and {self.widths} must be at least 1 each")
        standardise = Standardise(in_features, self.scale or "each", self.clip)
        stages: list[list[nn.Module]] = [[standardise]]
        for inputs, outputs in pairwise([in_features, *self.widths]):
            norm, dropout = nn.BatchNorm1d(outputs), nn.Dropout(self.dropout)
            stages.append([nn.Linear(inputs, outputs, bias=False), norm, nn.ReLU(), dropout])
        # it has no parameters, and rests and moves with the first stage
        stages[:2] = [[layer for stage in stages[:2] for layer in stage]]
        self.model = nn.Sequential(*(nn.Sequential(*stage) for stage in stages))
        self.in_features, self.out_features = in_features, [in_features, *self.widths][-1]
        self.load_pretrained(self.weights, self.strict)
        assert standardise.num_batches_tracked is not None
        standardise.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_features) -> (B, out_features)."""
        features: Tensor = self.model(x)
        return features

    def stages(self) -> list[nn.Module]:
        """One for each width."""
        return list(self.model.children())


VectorBackbone = TabularMLP  # earlier name, which a config may hold
