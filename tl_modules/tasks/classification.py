"""One label out of C."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MulticlassF1Score,
)

from tl_modules.base import TransferModule
from tl_modules.errors import UserError


class Classification(TransferModule):
    """Cross-entropy; accuracy, macro F1, macro AUROC and the expected calibration error; class probabilities.

    Args:
        *args: As for `TransferModule`.
        class_weights: Weight of each class in the loss, in the order of `class_names`.
        label_smoothing: Share of the label that is spread over all classes (Szegedy et al., CVPR 2016).
        **kwargs: As for `TransferModule`.
    """

    monitor = ("val/accuracy", "max")
    classes: ClassVar[bool] = True
    class_weights: Tensor | None

    def __init__(
        self, *args: Any, class_weights: list[float] | None = None, label_smoothing: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.num_outputs < 2:
            raise UserError(f"num_outputs: classification needs at least two classes, not {self.num_outputs}")
        if class_weights is not None and len(class_weights) != self.num_outputs:
            raise UserError(f"class_weights: {len(class_weights)} weights for {self.num_outputs} classes")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing: {label_smoothing} must lie in [0, 1)")
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        self.label_smoothing = label_smoothing

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of logits (B, C) and class numbers (B,)."""
        return F.cross_entropy(output, y, weight=self.class_weights, label_smoothing=self.label_smoothing)

    def metrics(self) -> MetricCollection:
        """Accuracy (micro), F1 and AUROC (macro), and the calibration error over 15 bins."""
        # each check of the arguments would wait for the device
        common: dict[str, Any] = {"num_classes": self.num_outputs, "validate_args": False}
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(average="micro", **common),
                "f1": MulticlassF1Score(average="macro", **common),
                "auroc": MulticlassAUROC(average="macro", thresholds=200, **common),
                "calibration_error": MulticlassCalibrationError(n_bins=15, **common),
            }
        )

    def predict(self, output: Tensor) -> Tensor:
        """Logits (B, C) -> probabilities (B, C)."""
        return output.float().softmax(1)

    def table(self, prediction: Tensor) -> dict[str, list[Any]]:
        """Columns `label` and `p_<class>`."""
        names = self.class_names or [str(number) for number in range(self.num_outputs)]
        columns: dict[str, list[Any]] = {"label": [names[i] for i in prediction.argmax(1).tolist()]}
        return columns | {f"p_{name}": _rounded(prediction[:, i]) for i, name in enumerate(names)}


def _rounded(values: Tensor) -> list[float]:
    """Six digits after the point, which is what float32 probabilities carry."""
    return [round(value, 6) for value in values.tolist()]
