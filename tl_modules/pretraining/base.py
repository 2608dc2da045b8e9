"""The base class of pretraining: a backbone learns from inputs only, monitored by the quality of its features.

    batch {"target": Batch((view, view), None, index)}
      -> views         of all domains together
      -> objective     terms of the loss, from a network behind the backbone that is discarded afterwards
    validation         the objective on held-out samples; features -> nearest neighbours, spread

Everything else is like any other run: `TransferModule` freezes, optimises, saves and resumes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from jsonargparse import lazy_instance  # type: ignore[attr-defined]
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tl_modules.backbones.base import Backbone
from tl_modules.backbones.vision import ImageBackbone
from tl_modules.batch import samples
from tl_modules.batch.output import by_domain, check_sources, full_precision
from tl_modules.batch.ranks import every_rank
from tl_modules.batch.samples import Batch, Collate, as_batch
from tl_modules.errors import UserError
from tl_modules.evaluation.transferability import knn
from tl_modules.finetuning.base import FineTuning
from tl_modules.finetuning.freezing import FullFineTuning
from tl_modules.finetuning.optimizer import WarmupCosine
from tl_modules.finetuning.staged import StagedModule
from tl_modules.module import Domains, TransferModule

__all__ = ["Pretraining"]

log = logging.getLogger(__name__)
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of `val/knn`
COLLAPSED = 0.01  # spreads below this count as collapse
SHOWN = 64  # images of a grid in TensorBoard


class Pretraining(TransferModule):
    """A backbone that learns without labels, for the next run's `--model.backbone.weights RUN`.

    A subclass implements `objective`, and passes its network behind the backbone to `__init__` as `head`.

    Training uses no labels. If validation has labels, nearest neighbours in feature space give the metric that chooses
    the epoch, `val/knn`: for each validation sample the vote of its neighbours among the others, as accuracy (for
    values, R2 of their mean). Without labels it is `val/loss`. `val/spread` measures how far the directions of the
    features spread; near 0 they have collapsed, and a warning is logged.

    Args:
        backbone: Maps raw samples to features.
        head: Function from the width of the features to the network behind them.
        schema: Describes inputs and labels as plain data; `tl fit` takes it from the data.
        finetuning: Which stages train when, and how fast.
        optimizer: Class or function of the parameter groups; its learning rate is that of the head.
        lr_scheduler: Class or function of the optimizer.
        checkpoint_weights: "all", or "trainable", from which no other run can start.

    Attributes:
        views: Number of augmented views of each sample that it compares; 1 takes samples as training data usually are.
        head_is_used: Whether the network behind the backbone predicts, so that training it alone makes sense.

    Raises:
        UserError: The strategy freezes the whole backbone, and the network behind it is not used.
    """

    views: ClassVar[int] = 1
    head_is_used: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    monitor = ("val/knn", "max")
    adapts = True  # its data are new to the backbone, so BatchNorm updates its statistics

    def __init__(
        self,
        backbone: Backbone,
        head: Callable[[int], nn.Module],
        schema: dict | None = None,  # type: ignore[type-arg]  # as in `TransferModule`
        finetuning: FineTuning = lazy_instance(FullFineTuning),  # noqa: B008 - plain data until it is built
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-2),
        lr_scheduler: LRSchedulerCallable | None = WarmupCosine,
        checkpoint_weights: Literal["all", "trainable"] = "all",
    ) -> None:
        super().__init__(
            backbone,
            {"x": {}, "y": {}} | (schema or {}),
            head=lambda features, _: head(features),  # type: ignore[arg-type, return-value]
            finetuning=finetuning,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            checkpoint_weights=checkpoint_weights,
        )
        if not (self.head_is_used or self.trainable_stages()):
            raise UserError(
                f"finetuning: {self.strategy_name()} freezes the whole backbone, so pretraining would train "
                "only the part that is discarded; use FullFineTuning, or LastStages"
            )
        self.seen: list[tuple[Tensor, Any]] = []  # features and labels of the current evaluation
        self.warned = False
        if not {"classes", "values"} & self.schema["y"].keys():
            self.monitor = ("val/loss", "min")

    def objective(self, *views: Any) -> dict[str, Tensor]:
        """Computes terms of the loss from views of B samples, each a tree: scalars by name, whose sum is minimised."""
        raise NotImplementedError

    # Interface for other parts

    @property
    def num_outputs(self) -> int:
        """Returns 0, since no output belongs to a label."""
        return 0

    def task_description(self) -> dict[str, Any]:
        """Returns only the class: another run of it can then reuse the head, whatever the labels."""
        return {"task": type(self).__name__, "class_names": None, "num_outputs": 0}

    @property
    def data_defaults(self) -> dict[str, Any]:
        """Requests unlabelled training data and `views` views; if there are several, they are augmented."""
        compared = {"augment": "views"} if self.views > 1 else {}
        return {**self.backbone.data_defaults, "views": self.views, "unlabelled": True, **compared}

    @property
    def collate(self) -> Collate:
        """Returns a collate function that makes a tree of each view."""
        return CollateViews(self.backbone.prepare, self.label) if self.views > 1 else super().collate

    # Training

    def views_of(self, batch: Domains) -> list[Any]:
        """Returns the views of a batch, each over all its domains together.

        Raises:
            UserError: The data returns other views, or domains whose inputs do not make one batch.
        """
        parts = [part.x if isinstance(part.x, tuple) and self.views > 1 else (part.x,) for part in batch.values()]
        if any(len(part) < self.views for part in parts):
            raise UserError(
                f"data: {type(self).__name__} compares {self.views} views of a sample: x must be a tuple of them, as a "
                "TransferDataModule returns"
            )
        found = []
        for xs in zip(*parts, strict=True):
            aligned = self.backbone.align(list(xs))
            check_sources([f"source/{name}" for name in batch], aligned)
            found.append(samples.concat(aligned))
        return found

    def project(self, views: Sequence[Any]) -> list[Any]:
        """Applies backbone and head to each view; all pass as one batch."""
        features = self.encode(samples.concat(list(views)))
        with full_precision(self.device):
            return samples.split(self.decode(features), [samples.count(view) for view in views])

    def training_step(self, batch: Domains, batch_idx: int) -> Any:
        """Computes the sum of the objective's terms."""
        views = self.views_of({name: as_batch(part) for name, part in batch.items()})
        terms = self.objective(*views)
        total = reduce(torch.add, terms.values())
        self.terms.add({"loss": total, **(terms if len(terms) > 1 else {})}, samples.count(views[0]))
        return total

    def on_train_start(self) -> None:
        """Checks that the strategy can train; labels and methods are not checked."""
        self.open_stages()  # a run resumed mid-epoch skips on_train_epoch_start
        self.finetuning.check(self, by_domain(self.trainer.train_dataloader, DataLoader))
        StagedModule.on_train_start(self)

    # Evaluation

    def validation_step(self, batch: Domains, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Stores the features of the first loader, and measures the objective on held-out samples."""
        if dataloader_idx > 0:
            return
        ((name, part),) = batch.items()
        part = as_batch(part)
        plain, rest = (part.x[0], part.x[1:]) if self.views > 1 else (part.x, part.x)
        self._keep(plain, part.y)
        self._measure({name: Batch(rest)}, batch_idx, "val")

    def test_step(self, batch: Domains, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Stores the features; measures the objective if it takes single samples."""
        ((name, part),) = batch.items()
        part = as_batch(part)
        self._keep(part.x, part.y)
        if self.views == 1:
            self._measure({name: part}, batch_idx, "test")

    def _keep(self, x: Any, y: Any) -> None:
        self.seen.append((self.encode(x).float().cpu(), samples.move(y, "cpu")))

    def _measure(self, batch: Domains, batch_idx: int, split: str) -> None:
        views = self.views_of(batch)
        count = samples.count(views[0])
        if count == 1:
            return  # nothing to compare with
        with torch.random.fork_rng():  # the same random numbers in each validation, without changing those of training
            torch.manual_seed(batch_idx)
            loss = reduce(torch.add, self.objective(*views).values())
        mean = getattr(self, f"{split}_loss")
        mean.update(loss.expand(count))
        self.log(f"{split}/loss", mean, metric_attribute=f"{split}_loss", batch_size=count, add_dataloader_idx=False)

    def on_validation_epoch_end(self) -> None:
        """Measures the quality of the features, and warns if they have collapsed."""
        super().on_validation_epoch_end()
        self._worth("val")

    def on_test_epoch_end(self) -> None:
        """Measures the quality of the features."""
        super().on_test_epoch_end()
        self._worth("test")

    def _worth(self, split: str) -> None:
        parts = [part for parts in every_rank(self.trainer, self.seen) for part in parts]
        self.seen = []
        if sum(len(features) for features, _ in parts) < 2:
            return
        features, y = samples.concat([features for features, _ in parts]), samples.concat([y for _, y in parts])
        found = self.measures(features, y)
        self.log_dict({f"{split}/{name}": value for name, value in found.items()}, batch_size=1)
        if found["spread"] < COLLAPSED and not (self.warned or self.trainer.sanity_checking):
            self.warned = True
            if self.trainer.is_global_zero:
                log.warning(
                    "epoch %d: the features have collapsed to one direction (%s/spread %.2g; evenly spread it is 1), "
                    "so they no longer distinguish samples; lower --model.optimizer.lr, augment more, or use another "
                    "pretraining",
                    self.current_epoch,
                    split,
                    found["spread"],
                )

    def measures(self, features: Tensor, y: Any) -> dict[str, float]:
        """Returns measures of the quality of a split's features (N, D) by name, given their labels, or None without."""
        found = {"spread": spread(features)}
        if isinstance(y, Tensor) and {"classes", "values"} & self.schema["y"].keys():
            y = y.float() if self.class_names is None else y
            sound = bool(features.isfinite().all())
            found["knn"] = knn(features, y, NEIGHBOURS, TEMPERATURE) if sound else float("nan")
        return found

    def on_predict_start(self) -> None:
        """Rejects `tl predict`.

        Raises:
            UserError: Always.
        """
        raise UserError(
            f"predict: {type(self).__name__} has learnt features, no labels; write the features with `tl embed --run "
            "RUN`, or train a task on them with `tl fit --model.backbone.weights RUN`"
        )

    def show(self, title: str, images: Tensor) -> None:
        """Writes images (N, 1 or 3, H, W) in [0, 1] to TensorBoard, 8 in a row."""
        from torchvision.utils import make_grid

        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger) and self.trainer.is_global_zero:
                grid = make_grid(images[:SHOWN].float().cpu().clamp(0, 1))
                logger.experiment.add_image(title, grid, self.trainer.global_step)


def spread(features: Tensor) -> float:
    """Computes `sqrt(D) mean_d std(f_d / |f|)` of (N, D): 1 if directions are evenly spread, 0 if all are the same.

    The measure of collapse of Chen and He (SimSiam, CVPR 2021).
    """
    unit = F.normalize(features.float())
    return float(unit.std(0, unbiased=False).mean() * unit.shape[1] ** 0.5)


class CollateViews(Collate):
    """Makes a batch of samples ((view, ...), y, index): each view becomes a tree."""

    def __call__(self, samples: Sequence[tuple[Any, ...]]) -> Any:
        """Returns the batch; samples without views, as in `tl test`, are collated as usual."""
        batch = super().__call__([(None, *rest) for _, *rest in samples])
        xs = [x for x, *_ in samples]
        if isinstance(xs[0], tuple):
            return batch._replace(x=tuple(self.prepare(view) for view in zip(*xs, strict=True)))
        return batch._replace(x=self.prepare(xs))


def input_kind(backbone: Backbone, schema: Mapping[str, Any]) -> str:
    """Returns the kind of the inputs, image or numeric, from the schema, or else from the backbone.

    Raises:
        UserError: It is neither.
    """
    x = schema.get("x") or {}
    kind = next((kind for kind in ("image", "numeric") if kind in x), None)
    if not x and isinstance(backbone, ImageBackbone):
        kind = "image"
    elif not x and hasattr(backbone, "in_features"):
        kind = "numeric"
    if kind is None:
        raise UserError(
            f"model: this pretraining takes images or rows of numbers, not {', '.join(x) or 'unknown inputs'}; use "
            "SimCLR, VICReg or DINO with your own transforms, --data.augment"
        )
    return kind
