"""Regression of one or more real values."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection, R2Score

from tl_modules.batch.output import DomainOutput
from tl_modules.errors import UserError, short
from tl_modules.methods.functional import ridge
from tl_modules.module import TransferModule

__all__ = ["Regression"]


class Regression(TransferModule):
    """Mean squared error; MAE, RMSE and R2; the values themselves.

    The head outputs standardised values, (y - mean) / deviation of the training labels, so that labels in any unit are
    learnt alike; outputs and metrics are in the label's unit, the loss in deviations. A checkpoint holds both.

    Args:
        *args: As for `TransferModule`.
        **kwargs: As for `TransferModule`.

    Raises:
        UserError: The labels are classes.
    """

    monitor = ("val/rmse", "min")
    label_mean: Tensor
    label_std: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.class_names is not None:
            raise UserError(
                f"schema: the labels are the classes {short(self.class_names)}; pass --model Classification, or, for a "
                "table whose labels are numbers, --data.kind values"
            )
        self.register_buffer("label_mean", torch.zeros(self.num_outputs))
        self.register_buffer("label_std", torch.ones(self.num_outputs))

    def see_labels(self, labels: Any) -> None:
        """Stores mean and deviation of labels (N,) or (N, K), per column."""
        values = torch.as_tensor(labels, dtype=torch.float64).view(len(labels), -1)
        deviation = values.std(0, correction=0)
        self.label_mean.copy_(values.mean(0))
        self.label_std.copy_(torch.where(deviation > 0, deviation, 1.0))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also reads a checkpoint from before labels were standardised."""
        for name in ("label_mean", "label_std"):
            checkpoint["state_dict"].setdefault(name, getattr(self, name).clone())
        super().on_load_checkpoint(checkpoint)

    def decode(self, features: Any) -> Tensor:
        """Maps features to values (B, K), in the label's unit."""
        values: Tensor = super().decode(features) * self.label_std + self.label_mean
        return values

    def loss(self, out: DomainOutput) -> Tensor:
        """Computes the mean squared error (B,) of outputs (B, K) and values (B,) or (B, K), in deviations."""
        y = out.y.view_as(out.output).to(out.output.dtype)
        return F.mse_loss(out.output / self.label_std, y / self.label_std, reduction="none").mean(1)

    def closed_form(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Fits ridge regression."""
        mean, std = self.label_mean.cpu(), self.label_std.cpu()
        return ridge(features, (y.view(len(y), -1) - mean) / std)

    def metrics(self) -> MetricCollection:
        """Returns MAE and RMSE in the label's unit, and R2."""
        outputs = self.num_outputs
        return MetricCollection(
            {
                "mae": MeanAbsoluteError(num_outputs=outputs) if outputs > 1 else MeanAbsoluteError(),
                "rmse": MeanSquaredError(squared=False, num_outputs=outputs),
                "r2": R2Score(),
            }
        )

    def postprocess(self, out: DomainOutput) -> Tensor:
        """Maps outputs (B, K) to values (B,) if K is 1, otherwise (B, K)."""
        return cast(Tensor, out.output).float().squeeze(1)

    def prediction_columns(self, prediction: Tensor) -> dict[str, list[Any]]:
        """Returns columns `value`, or `value_0`, `value_1`, ..."""
        if prediction.ndim == 1:
            return {"value": prediction.tolist()}
        return {f"value_{i}": prediction[:, i].tolist() for i in range(prediction.shape[1])}
