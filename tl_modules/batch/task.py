"""The interface of a task."""

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

# the schema: inputs and labels described as plain data, passed once from data to model: {"x": ..., "y": ...}
#   x   {"image": {}} · {"text": {}} · {"audio": {"rate": 8000}} · {"numeric": ["age", "hours"]} ·
#       {"ids": {"user": 610, "item": 9724}} · with several inputs, one of these by each name
#   y   {"classes": ["cat", "dog"]} · {"values": 1} · {"boxes": [...]} · {"masks": [...]} · {"characters": "abc"} · ...
Schema = Mapping[str, Any]
ROWS = 12  # values of a table row that are drawn
SIDE = 512  # pixels per side of a drawn image
POINTS = 10_000  # points of a drawn curve


class Task(LightningModule):
    """The interface of a task: how labels are encoded, and its loss, prediction, metrics and columns.

    Attributes:
        monitor: The metric that chooses the best epoch, and "min" or "max".
        is_classification: Whether there are class probabilities.
        top_k: How many classes, the most probable ones, are columns of `tl predict`'s CSV; None: all of them.
        temperature: Divides a classification's logits, once `tl calibrate` has found it.
        uses_pooled_features: Whether the head takes one vector per sample; otherwise it takes the backbone's features,
            e.g. a pyramid of maps or the states of all tokens.
        needs_labels: Whether the loss needs labels.
        label: Function from raw labels to a tree, run in a loader's worker; small, so that it can be pickled.
    """

    monitor: tuple[str, str] = ("val/loss", "min")
    is_classification: ClassVar[bool] = False
    uses_pooled_features: ClassVar[bool] = True
    top_k: int | None = None
    temperature: float = 1.0
    needs_labels: ClassVar[bool] = True
    schema: Schema
    head: nn.Module
    label: Callable[[Sequence[Any]], Any] = staticmethod(samples.collate)

    @property
    def num_outputs(self) -> int:
        """Returns the width of the head: the number of classes, values, ... in the schema's labels."""
        labels = next(iter(self.schema["y"].values()))
        return labels if isinstance(labels, int) else len(labels)

    @property
    def class_names(self) -> list[str] | None:
        """Returns the names of the classes, in the order of their numbers; None if there are no classes."""
        names = self.schema["y"].get("classes")
        return list(names) if isinstance(names, list | tuple) else None

    def decode(self, features: Any) -> Any:
        """Maps features to outputs with the head. A head that needs y runs in `loss` and `postprocess` instead."""
        if isinstance(features, samples.Padded):
            return samples.Padded(self.head(features.values), features.shapes)
        return self.head(features)

    def loss(self, out: DomainOutput) -> Tensor:
        """Computes the loss of each sample, (B,), from `out.output` and `out.y`."""
        raise NotImplementedError

    def loss_weight(self, out: DomainOutput) -> Tensor | None:
        """Returns how much each sample's loss counts in a mean, (B,), e.g. its class weight; None: equally."""
        return None

    def closed_form(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Computes weight (num_outputs, D) and bias (num_outputs,) of a linear head for features (N, D) and N labels.

        Returns None if there is no closed form; the head then starts at random.
        """
        return None

    def see_labels(self, labels: Any) -> None:
        """Learns from the labels (N, ...) of the training data when training starts; keeps its results in buffers."""

    def postprocess(self, out: DomainOutput) -> Any:
        """Returns what a user wants of each sample, a tree of B: probabilities, values, boxes, texts."""
        raise NotImplementedError

    def probabilities(self, out: DomainOutput) -> Tensor:
        """Returns the class probabilities, (B, C), of a classification."""
        raise NotImplementedError

    def metrics(self) -> MetricCollection:
        """Returns the metrics of a split, each a scalar."""
        return MetricCollection({})

    def update_metrics(self, metrics: MetricCollection, prediction: Any, y: Any) -> None:
        """Updates the metrics with a batch's predictions and labels."""
        metrics.update(prediction, y)

    def prediction_columns(self, prediction: Any) -> dict[str, list[Any]]:
        """Turns predictions of B samples into columns of `tl predict`'s CSV, B values each; by default one column."""
        each = [samples.first(one) for one in samples.unbind(prediction)]
        return {"prediction": [one.tolist() if isinstance(one, Tensor) else one for one in each]}

    def to_labels(self, prediction: Any) -> Any:
        """Turns predictions into what is compared with labels: class numbers (B,), or the values themselves."""
        return prediction.argmax(1) if self.is_classification else prediction

    def primary_metric(self, predicted: Any, y: Any) -> float:
        """Computes the metric of `monitor` from the result of `to_labels` and from labels."""
        name = type(self).monitor[0].removeprefix("val/")
        metric = MetricCollection({name: self.metrics()[name]})
        self.update_metrics(metric, predicted.long() if self.is_classification else predicted, y)
        return float(metric.compute()[name])

    def task_description(self) -> dict[str, Any]:
        """Describes the task and its labels as plain data."""
        return {"task": type(self).__name__, "class_names": self.class_names, "num_outputs": self.num_outputs}

    def name_of(self, label: Any) -> str:
        """Returns the name of a label, or of a prediction from `to_labels`, for titles."""
        if isinstance(label, Tensor) and self.class_names is not None and label.ndim == 0:
            return self.class_names[int(label)]
        return ", ".join(f"{v:.3g}" for v in label.reshape(-1).tolist()) if isinstance(label, Tensor) else str(label)

    def draw(self, axes: Any, x: Any, y: Any, prediction: Any) -> str:
        """Draws a raw sample on matplotlib's axes and returns a title.

        Args:
            axes: The axes.
            x: The raw input, as the data set returns it.
            y: Its raw label; None if it is hidden.
            prediction: The prediction of this sample, a batch of one; None if there is none.
        """
        draw_input(axes, x, self.schema.get("x") or {})
        true = "?" if y is None else self.name_of(samples.first(samples.collate([y])))
        if prediction is None:
            return true
        return f"{true} \u2192 {self.name_of(samples.first(self.to_labels(prediction)))}"


def draw_input(axes: Any, x: Any, schema: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Draws a raw sample by its kind: an image, a row of numbers, a curve, a text; of several inputs only one.

    Args:
        axes: matplotlib's.
        x: The sample; of several inputs the first image is drawn, otherwise the first input.
        schema: Its description, which names the columns of a table row.
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
        if low < 0 or high > 1:  # it has been normalised
            image = (image - low) / (high - low)
        axes.imshow(image.permute(1, 2, 0) if len(image) == 3 else image[0], cmap="gray", vmin=0, vmax=1)
    elif getattr(x, "ndim", 0) == 1:
        axes.plot(_thinned(x, POINTS))
    else:
        text = str(x)[:200].replace("$", r"\$")  # matplotlib reads $...$ as a formula
        axes.text(0.02, 0.5, text, wrap=True, va="center", fontsize=7)


def _thinned(x: Tensor, most: int) -> Tensor:
    """Keeps every n-th value of a curve (T,) or n-th pixel of an image (C, H, W), so that at most `most` are left."""
    step = max(1, -(-max(x.shape[-2:]) // most))  # also for a row without numbers
    return x[..., ::step] if x.ndim == 1 else x[..., ::step, ::step]


def row_lines(x: Any, schema: Mapping[str, Any]) -> list[str]:
    """Returns the columns of a table row with their values, one per line."""
    numbers, codes = (x["numeric"], x["categorical"].tolist()) if isinstance(x, Mapping) else (x, [])
    known = sorted(schema.get("categorical", {}).items())
    lines = [f"{name}  {value:.3g}" for name, value in zip(schema["numeric"], numbers.tolist(), strict=False)]
    return lines + [f"{name}  {['unknown', *values][n]}" for (name, values), n in zip(known, codes, strict=False)]
