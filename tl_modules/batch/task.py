"""The form that a task fills in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection

from tl_modules.batch import samples
from tl_modules.batch.output import DomainOutput

# what inputs and labels are, as plain data that travels once, from the data to the model: {"x": ..., "y": ...}
#   x   {"image": {}} · {"text": {}} · {"audio": {"rate": 8000}} · {"numeric": ["age", "hours"]} ·
#       {"ids": {"user": 610, "item": 9724}} · of several inputs, one of these by the name of each
#   y   {"classes": ["cat", "dog"]} · {"values": 1} · {"boxes": [...]} · {"masks": [...]} · {"characters": "abc"} · ...
Schema = Mapping[str, Any]
ROWS = 12  # numbers of a row that are drawn
SIDE = 512  # pixels of a drawn image
POINTS = 10_000  # of a drawn curve


class Task(LightningModule):
    """The form that a task fills in: what labels become, and what loss, prediction, metrics and columns are.

    Attributes:
        monitor: The metric that chooses the best epoch, and "min" or "max".
        is_classification: Whether there are probabilities of classes.
        temperature: What a classification's logits are divided by, once `tl calibrate` has found it.
        uses_pooled_features: Whether the head takes one vector per sample; otherwise it takes the features as the
            backbone gives them, e.g. a pyramid of maps or the states of all tokens.
        needs_labels: Whether there is no loss without labels.
        label: Raw labels -> a tree, in a loader's worker; small, so that it can be sent there.
    """

    monitor: tuple[str, str] = ("val/loss", "min")
    is_classification: ClassVar[bool] = False
    uses_pooled_features: ClassVar[bool] = True
    temperature: float = 1.0
    needs_labels: ClassVar[bool] = True
    schema: Schema
    head: nn.Module
    label: Callable[[Sequence[Any]], Any] = staticmethod(samples.collate)

    @property
    def num_outputs(self) -> int:
        """Width of the head: how many classes, values, ... the schema's labels have."""
        labels = next(iter(self.schema["y"].values()))
        return labels if isinstance(labels, int) else len(labels)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, in the order of their numbers; None where there are none."""
        names = self.schema["y"].get("classes")
        return list(names) if isinstance(names, list | tuple) else None

    def decode(self, features: Any) -> Any:
        """Features -> outputs, by the head. A head that needs y runs in `loss` and `postprocess` instead."""
        if isinstance(features, samples.Padded):
            return samples.Padded(self.head(features.values), features.shapes)
        return self.head(features)

    def loss(self, out: DomainOutput) -> Tensor:
        """The task's loss of each sample, (B,), of `out.output` and `out.y`."""
        raise NotImplementedError

    def loss_weight(self, out: DomainOutput) -> Tensor | None:
        """How much each sample's loss counts in a mean, (B,), e.g. its class's weight; None: all the same."""
        return None

    def closed_form(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Weight (num_outputs, D) and bias (num_outputs,) of a linear head for features (N, D) and labels (N, ...).

        None: there is no closed form, and the head starts at random.
        """
        return None

    def see_labels(self, labels: Any) -> None:
        """Learns from the labels (N, ...) that training sees, when it starts; what it learns lives in buffers."""

    def postprocess(self, out: DomainOutput) -> Any:
        """What a user wants of each sample, a tree of B: probabilities, values, boxes, texts."""
        raise NotImplementedError

    def probabilities(self, out: DomainOutput) -> Tensor:
        """The probabilities of the classes, (B, C); of a classification."""
        raise NotImplementedError

    def metrics(self) -> MetricCollection:
        """The metrics of a split, each a scalar."""
        return MetricCollection({})

    def update_metrics(self, metrics: MetricCollection, prediction: Any, y: Any) -> None:
        """Takes a batch's predictions and labels into the metrics."""
        metrics.update(prediction, y)

    def prediction_columns(self, prediction: Any) -> dict[str, list[Any]]:
        """Predictions of B samples -> columns of `tl predict`'s CSV, B values each; as they are, unless a task says."""
        each = [samples.first(one) for one in samples.unbind(prediction)]
        return {"prediction": [one.tolist() if isinstance(one, Tensor) else one for one in each]}

    def to_labels(self, prediction: Any) -> Any:
        """Predictions -> what is compared with labels: class numbers (B,), or the values themselves."""
        return prediction.argmax(1) if self.is_classification else prediction

    def primary_metric(self, predicted: Any, y: Any) -> float:
        """The task's first metric, that of `monitor`, of what `to_labels` gives and of labels."""
        name = type(self).monitor[0].removeprefix("val/")
        metric = MetricCollection({name: self.metrics()[name]})
        self.update_metrics(metric, predicted.long() if self.is_classification else predicted, y)
        return float(metric.compute()[name])

    def task_description(self) -> dict[str, Any]:
        """Returns the task and its labels, as plain data."""
        return {"task": type(self).__name__, "class_names": self.class_names, "num_outputs": self.num_outputs}

    def name_of(self, label: Any) -> str:
        """Names a label, or a prediction as `to_labels` gives it, for titles."""
        if isinstance(label, Tensor) and self.class_names is not None and label.ndim == 0:
            return self.class_names[int(label)]
        return ", ".join(f"{v:.3g}" for v in label.reshape(-1).tolist()) if isinstance(label, Tensor) else str(label)

    def draw(self, axes: Any, x: Any, y: Any, prediction: Any) -> str:
        """Draws a raw sample on matplotlib's axes and returns a title.

        Args:
            axes: The axes.
            x: The raw input, as the data set gives it.
            y: Its raw label; None: it is hidden.
            prediction: Of this sample, a batch of one; None: there is none.
        """
        draw_input(axes, x, self.schema.get("x") or {})
        true = "?" if y is None else self.name_of(samples.first(samples.collate([y])))
        if prediction is None:
            return true
        return f"{true} \u2192 {self.name_of(samples.first(self.to_labels(prediction)))}"


def draw_input(axes: Any, x: Any, schema: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Draws a raw sample as what it is: an image, a row of numbers, a curve, a text; of several inputs one of these.

    Args:
        axes: matplotlib's.
        x: The sample; of several inputs the first image is drawn, or the first.
        schema: What it is; names the columns of a row of numbers.
    """
    is_row = "numeric" in schema and (isinstance(x, Mapping) or getattr(x, "ndim", 0) == 1)
    lines = row_lines(x, schema) if is_row else []
    if isinstance(x, Mapping):
        parts = list(x.values())
        x = next((part for part in parts if getattr(part, "ndim", 0) == 3), parts[0])
    if lines:
        shown = lines if len(lines) <= ROWS else [*lines[: ROWS - 1], f"and {len(lines) - ROWS + 1} more"]
        axes.text(0.02, 0.98, "\n".join(shown), va="top", fontsize=7, parse_math=False)
    elif getattr(x, "ndim", 0) == 3:
        x = _thinned(x, SIDE)
        image = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        low, high = float(image.min()), float(image.max())
        if low < 0 or high > 1:  # it was normalised
            image = (image - low) / (high - low)
        axes.imshow(image.permute(1, 2, 0) if len(image) == 3 else image[0], cmap="gray", vmin=0, vmax=1)
    elif getattr(x, "ndim", 0) == 1:
        axes.plot(_thinned(x, POINTS))
    else:
        text = str(x)[:200].replace("$", r"\$")  # or what is between two of them would be a formula
        axes.text(0.02, 0.5, text, wrap=True, va="center", fontsize=7)


def _thinned(x: Tensor, most: int) -> Tensor:
    """Every n-th value of a curve (T,) or every n-th pixel of an image (C, H, W), so that at most so many are left."""
    step = -(-max(x.shape[-2:]) // most)
    return x[..., ::step] if x.ndim == 1 else x[..., ::step, ::step]


def row_lines(x: Any, schema: Mapping[str, Any]) -> list[str]:
    """The columns of a table's row, each with its value."""
    numbers, codes = (x["numeric"], x["categorical"].tolist()) if isinstance(x, Mapping) else (x, [])
    known = sorted(schema.get("categorical", {}).items())
    lines = [f"{name}  {value:.3g}" for name, value in zip(schema["numeric"], numbers.tolist(), strict=False)]
    return lines + [f"{name}  {['unknown', *values][n]}" for (name, values), n in zip(known, codes, strict=False)]
