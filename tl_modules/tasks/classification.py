"""Classification: one label out of C."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
)

from tl_modules.batch.output import DomainOutput
from tl_modules.errors import UserError
from tl_modules.methods.functional import discriminant
from tl_modules.module import TransferModule
from tl_modules.tasks.auroc import MacroAUROC

__all__ = ["Classification"]

log = logging.getLogger(__name__)


class Classification(TransferModule):
    """Cross-entropy; accuracy, macro F1, macro AUROC and the expected calibration error; class probabilities.

    Args:
        *args: As for `TransferModule`.
        class_weights: Weight of each class in the loss, in the order of `class_names`.
        label_smoothing: Share of the label that is distributed over all classes (Szegedy et al., CVPR 2016).
        **kwargs: As for `TransferModule`.
    """

    monitor = ("val/accuracy", "max")
    is_classification: ClassVar[bool] = True
    class_weights: Tensor | None

    def __init__(
        self, *args: Any, class_weights: list[float] | None = None, label_smoothing: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.num_outputs < 2:
            values = "values" in (self.schema.get("y") or {})
            hint = (
                "; the labels are numbers: pass --model Regression, or --data.kind classes if they are classes"
                if values
                else ""
            )
            raise UserError(f"schema: classification needs at least two classes, not {self.num_outputs}{hint}")
        if class_weights is not None and len(class_weights) != self.num_outputs:
            raise UserError(f"class_weights: {len(class_weights)} weights for {self.num_outputs} classes")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing: {label_smoothing} must be in [0, 1)")
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        self.label_smoothing = label_smoothing
        self.said: set[str] = set()

    def decode(self, features: Any) -> Tensor:
        """Maps features to logits (B, C), divided by the temperature."""
        logits: Tensor = super().decode(features)
        return logits if self.temperature == 1 else logits / self.temperature

    def loss(self, out: DomainOutput) -> Tensor:
        """Computes the cross-entropy (B,) of logits (B, C) and class numbers (B,), or soft labels (B, C)."""
        return F.cross_entropy(out.output, out.y, label_smoothing=self.label_smoothing, reduction="none")

    def closed_form(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Fits shrinkage discriminant analysis."""
        return discriminant(features, y, self.num_outputs)

    def loss_weight(self, out: DomainOutput) -> Tensor | None:
        """Returns the weights of the samples' classes."""
        if self.class_weights is None:
            return None
        return out.y @ self.class_weights if out.y.is_floating_point() else self.class_weights[out.y]

    def metrics(self) -> MetricCollection:
        """Returns accuracy (micro), F1 and AUROC (macro, over the classes present), calibration error over 15 bins."""
        # validate_args=False: each check would synchronise with the device
        common: dict[str, Any] = {"num_classes": self.num_outputs, "validate_args": False}
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(average="micro", **common),
                "f1": MacroF1(**common),
                "auroc": MacroAUROC(self.num_outputs),
                "calibration_error": MulticlassCalibrationError(n_bins=15, **common),
            }
        )

    def on_validation_end(self) -> None:
        """Logs once which classes the macro averages leave out."""
        self._say_absent(self.val_metrics, "validation")

    def on_test_end(self) -> None:
        """Logs once which classes the macro averages leave out."""
        self._say_absent(self.test_metrics, "test")

    def _say_absent(self, metrics: MetricCollection, split: str) -> None:
        absent = next((m.absent for m in metrics.values(copy_state=False) if isinstance(m, MacroF1)), [])
        if not absent or split in self.said or self.trainer.sanity_checking or not self.trainer.is_global_zero:
            return
        self.said.add(split)
        names = self.class_names or [str(number) for number in range(self.num_outputs)]
        log.warning(
            "f1, auroc: the %s split has no label of %s; macro averages are over the other classes",
            split,
            ", ".join(names[number] for number in absent[:5]) + (", ..." if len(absent) > 5 else ""),
        )

    def postprocess(self, out: DomainOutput) -> Tensor:
        """Maps logits (B, C) to probabilities (B, C)."""
        return cast(Tensor, out.output).float().softmax(1)

    def probabilities(self, out: DomainOutput) -> Tensor:
        """Computes the softmax of the logits, with its gradient."""
        return cast(Tensor, out.output).softmax(1)

    def prediction_columns(self, prediction: Tensor) -> dict[str, list[Any]]:
        """Returns columns `label` and `p_<class>`, or `label`, `p`, `label_2`, `p_2`, ... with `top_k`."""
        names = self.class_names or [str(number) for number in range(self.num_outputs)]
        return class_columns(prediction, names, self.top_k)


class MacroF1(MulticlassF1Score):
    """The mean F1 of the classes in the labels; torchmetrics counts a class that is only predicted as 0."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(average="none", **kwargs)
        self.absent: list[int] = []

    def compute(self) -> Tensor:
        """Returns a scalar; nan without labels."""
        present = cast(Tensor, self.tp) + cast(Tensor, self.fn) > 0
        self.absent = (~present).nonzero().flatten().tolist()
        return super().compute()[present].mean()


def class_columns(probabilities: Tensor, names: Sequence[str], top_k: int | None = None) -> dict[str, list[Any]]:
    """Turns probabilities (B, C) into columns `label` and `p_<class>`; with `top_k` those of the most probable classes.

    Those are `label` and `p`, `label_2` and `p_2`, and so on.
    """
    if top_k is not None:
        values, numbers = probabilities.topk(min(top_k, len(names)))
        found: dict[str, list[Any]] = {}
        for place, suffix in enumerate(["", *(f"_{place}" for place in range(2, 1 + values.shape[1]))]):
            found[f"label{suffix}"] = [names[i] for i in numbers[:, place].tolist()]
            found[f"p{suffix}"] = _rounded(values[:, place])
        return found
    columns: dict[str, list[Any]] = {"label": [names[i] for i in probabilities.argmax(1).tolist()]}
    return columns | {f"p_{name}": _rounded(probabilities[:, i]) for i, name in enumerate(names)}


def _rounded(values: Tensor) -> list[float]:
    """Rounds to six decimals, the precision of float32 probabilities."""
    return [round(value, 6) for value in values.tolist()]
