"""Evaluation steps: loss and metrics of a split, predictions."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from tl_modules.batch.output import DomainOutput
from tl_modules.batch.task import Task
from tl_modules.errors import UserError

log = logging.getLogger(__name__)


class EvaluatedTask(Task):
    """A task with validation, test and prediction steps.

    Loss and metrics of a split are logged as val/loss, val/accuracy, test/loss, ...
    """

    def build_metrics(self) -> None:
        """Builds the metrics of each split; called once the task knows its schema."""
        self.val_metrics = self.metrics().clone(prefix="val/")
        self.test_metrics = self.metrics().clone(prefix="test/")
        self.val_loss, self.test_loss = LossMean(), LossMean()

    def on_fit_start(self) -> None:
        """Leaves costly metrics to `tl test`, except those that choose the epoch or end the run."""
        monitored = {self.monitor[0], *(getattr(each, "monitor", None) for each in cast(Any, self.trainer).callbacks)}
        metrics = dict(self.val_metrics.items(keep_base=True, copy_state=False))
        left = [name for name, each in metrics.items() if getattr(each, "costly", False)]
        if left := [name for name in left if f"val/{name}" not in monitored]:
            self.val_metrics = MetricCollection({n: m for n, m in metrics.items() if n not in left}, prefix="val/")
            log.info("%s: left to `tl test`, being costly with this number of classes", ", ".join(left))

    def on_fit_end(self) -> None:
        """Restores them."""
        if len(self.val_metrics) < len(self.test_metrics):
            self.val_metrics = self.metrics().clone(prefix="val/").to(self.device)

    @abstractmethod
    def forward_domains(self, batch: Any) -> dict[str, DomainOutput]:
        """Runs all domains of a batch through backbone and head."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, DomainOutput]:
        """Updates loss and metrics if there are labels; returns the outputs, also of unlabelled batches."""
        return self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, DomainOutput]:
        """Updates loss and metrics of the test split."""
        return self._evaluate(batch, "test", dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> tuple[Any, Tensor | None]:
        """Returns the predictions and the samples' indices."""
        (output,) = self.forward_domains(batch).values()
        return output.prediction, output.index

    def _evaluate(self, batch: Any, split: str, number: int) -> dict[str, DomainOutput]:
        """Updates a split's loss and metrics; those of a second labelled loader are named with /dataloader_idx_1."""
        ((domain, output),) = self.forward_domains(batch).items()
        if output.y is None:
            return {domain: output}
        of_metrics, of_loss = (f"{split}_{what}{f'_{number}' if number else ''}" for what in ("metrics", "loss"))
        if not hasattr(self, of_loss):
            setattr(self, of_metrics, getattr(self, f"{split}_metrics").clone().to(self.device))
            setattr(self, of_loss, LossMean().to(self.device))
        metrics: MetricCollection = getattr(self, of_metrics)
        self.update_metrics(metrics, output.prediction, output.y)
        # not sync_dist: with uneven ranks it divides by a batch size that is rounded down (Lightning issue 21859)
        getattr(self, of_loss).update(output.loss, output.weight)
        measures = {of_loss: getattr(self, of_loss)}
        measures |= {f"{of_metrics}.{key}": m for key, m in metrics.items(keep_base=True, copy_state=False)}
        for attribute, measure in measures.items():
            name = f"{split}/{attribute.rpartition('.')[2] if '.' in attribute else 'loss'}"
            name += f"/dataloader_idx_{number}" if number else ""
            # metric_attribute is given, because Lightning searches for it only once
            self.log(name, measure, metric_attribute=attribute, batch_size=len(output), add_dataloader_idx=False)
        return {domain: output}

    def on_validation_epoch_end(self) -> None:
        """Rejects a validation loss that is not finite.

        Raises:
            UserError: The loss is nan or infinite.
        """
        self._check_finite(self.val_loss, "val/loss")

    def on_test_epoch_end(self) -> None:
        """Rejects a test loss that is not finite.

        Raises:
            UserError: The loss is nan or infinite.
        """
        self._check_finite(self.test_loss, "test/loss")

    def _check_finite(self, mean: LossMean, name: str) -> None:
        if mean.update_called and not mean.compute().isfinite():
            when = f"epoch {self.current_epoch}: " if self.trainer.state.fn == "fit" else ""
            raise UserError(
                f"{when}{name} is not finite: the outputs of some sample are nan or infinite; lower the learning rate, "
                "pass --trainer.gradient_clip_val 1 or --trainer.precision 32-true"
            )


class LossMean(Metric):
    """The weighted mean of an evaluation's loss over its samples, independent of the batches.

    torchmetrics' `MeanMetric` drops nan, or (`nan_strategy="disable"`, 1.9) ignores the weights.
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), "sum")
        self.add_state("weight", torch.zeros(()), "sum")

    def update(self, loss: Tensor, weight: Tensor | None = None) -> None:
        """Adds the losses (B,) and weights (B,) of samples; None: equal weights."""
        self.total += (loss if weight is None else weight * loss).sum()
        self.weight += len(loss) if weight is None else weight.sum()

    def compute(self) -> Tensor:
        """Returns the mean so far."""
        return self.total / self.weight
