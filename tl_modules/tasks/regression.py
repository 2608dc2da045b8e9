"""One or more real values."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection, R2Score

from tl_modules.batch.output import DomainOutput
from tl_modules.methods.functional import ridge
from tl_modules.module import TransferModule

__all__ = ["Regression"]


class Regression(TransferModule):
    """Mean squared error; MAE, RMSE and R2; the values themselves."""

    monitor = ("val/rmse", "min")

    def loss(self, out: DomainOutput) -> Tensor:
        """Mean squared error (B,) of outputs (B, K) and values (B,) or (B, K)."""
        return F.mse_loss(out.output, out.y.view_as(out.output).to(out.output.dtype), reduction="none").mean(1)

    def closed_form(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Ridge regression."""
        return ridge(features, y)

    def metrics(self) -> MetricCollection:
        """MAE and RMSE in the label's unit, and R2."""
        outputs = self.num_outputs
        return MetricCollection(
            {
                "mae": MeanAbsoluteError(num_outputs=outputs) if outputs > 1 else MeanAbsoluteError(),
                "rmse": MeanSquaredError(squared=False, num_outputs=outputs),
                "r2": R2Score(),
            }
        )

    def postprocess(self, out: DomainOutput) -> Tensor:
        """Outputs (B, K) -> values (B,) where K is 1, otherwise (B, K)."""
        return cast(Tensor, out.output).float().squeeze(1)

    def prediction_columns(self, prediction: Tensor) -> dict[str, list[Any]]:
        """Columns `value`, or `value_0`, `value_1`, ..."""
        if prediction.ndim == 1:
            return {"value": prediction.tolist()}
        return {f"value_{i}": prediction[:, i].tolist() for i in range(prediction.shape[1])}
