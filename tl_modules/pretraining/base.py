"""What every pretraining is: a backbone that learns from inputs alone, watched by what its features are worth.

    batch {"target": Batch((view, view), None, index)}
      -> views         those of all domains together
      -> objective     terms of the loss, of a network behind the backbone that is thrown away afterwards
    validation         the objective on held-out samples; features -> nearest neighbours, spread

Everything else is a run as any other: `TransferModule` freezes, optimises, saves and resumes.
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
from tl_modules.finetuning.freezing import Full
from tl_modules.finetuning.optimizer import WarmupCosine
from tl_modules.finetuning.staged import StagedModule
from tl_modules.module import Domains, TransferModule

__all__ = ["Pretraining"]

log = logging.getLogger(__name__)
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of `val/knn`
COLLAPSED = 0.01  # a spread below it
SHOWN = 64  # images of a grid in TensorBoard


class Pretraining(TransferModule):
    """A backbone that learns without labels, for the next run's `--model.backbone.weights RUN`.

    A subclass writes `objective`, and hands its network behind the backbone to `__init__` as `head`.

    Training gets no label at all. Where validation has some, the features' nearest neighbours are the metric that
    chooses the epoch, `val/knn`: of each validation sample those among the others, the accuracy of their vote (for
    values, R2 of their mean). Without labels it is `val/loss`. `val/spread` says how far the features' directions
    spread; near 0 they have collapsed, and a warning says so.

    Args:
        backbone: Raw samples -> features.
        head: Width of the features -> the network behind them.
        schema: What inputs and labels are, as plain data; `tl fit` takes it from the data.
        finetuning: Which stages train when, and how fast.
        optimizer: Class or function of the parameter groups; its learning rate is the head's.
        lr_scheduler: Class or function of the optimizer.
        save: "all", or "trainable", from which no other run can start.

    Attributes:
        views: How many augmented views of each sample it compares; 1 takes samples as training data usually are.
        head_is_used: Whether the network behind the backbone predicts, so that training it alone makes sense.

    Raises:
        UserError: The strategy keeps the whole backbone frozen, and the network behind it is not used.
    """

    views: ClassVar[int] = 1
    head_is_used: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    monitor = ("val/knn", "max")
    adapts = True  # its data are new to the backbone, whose BatchNorm follows them

    def __init__(
        self,
        backbone: Backbone,
        head: Callable[[int], nn.Module],
        schema: dict | None = None,  # type: ignore[type-arg]  # as in `TransferModule`
        finetuning: FineTuning = lazy_instance(Full),  # noqa: B008 - plain data until it is built
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-2),
        lr_scheduler: LRSchedulerCallable | None = WarmupCosine,
        save: Literal["all", "trainable"] = "all",
    ) -> None:
        super().__init__(
            backbone,
            {"x": {}, "y": {}} | (schema or {}),
            head=lambda features, _: head(features),  # type: ignore[arg-type, return-value]
            finetuning=finetuning,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            save=save,
        )
        if not (self.head_is_used or self.trainable_stages()):
            raise UserError(
                f"finetuning: {self.strategy_name()} keeps the whole backbone frozen, so that pretraining would train "
                "only what is thrown away; take Full, or LastStages"
            )
        self.seen: list[tuple[Tensor, Any]] = []  # features and labels of an evaluation
        self.warned = False
        if not {"classes", "values"} & self.schema["y"].keys():
            self.monitor = ("val/loss", "min")

    def objective(self, *views: Any) -> dict[str, Tensor]:
        """Views of B samples, each a tree -> the terms of the loss, scalars by name, whose sum is minimised."""
        raise NotImplementedError

    # What it is to the others

    @property
    def num_outputs(self) -> int:
        """None of its outputs is a label's."""
        return 0

    def task_description(self) -> dict[str, Any]:
        """The class alone: a second run of it takes the head along, whatever the labels."""
        return {"task": type(self).__name__, "class_names": None, "num_outputs": 0}

    @property
    def data_defaults(self) -> dict[str, Any]:
        """No labels in training, and so many views; views that are compared are augmented."""
        compared = {"augment": "views"} if self.views > 1 else {}
        return {**self.backbone.data_defaults, "views": self.views, "unlabelled": True, **compared}

    @property
    def collate(self) -> Collate:
        """Each view becomes a tree of its own."""
        return CollateViews(self.backbone.prepare, self.label) if self.views > 1 else super().collate

    # Training

    def views_of(self, batch: Domains) -> list[Any]:
        """The views of a batch, each those of all its domains together.

        Raises:
            UserError: The data give other views, or domains whose inputs do not make one batch.
        """
        parts = [part.x if isinstance(part.x, tuple) and self.views > 1 else (part.x,) for part in batch.values()]
        if any(len(part) < self.views for part in parts):
            raise UserError(
                f"data: {type(self).__name__} compares {self.views} views of a sample, so x must be a tuple of them; a "
                "TransferDataModule gives these"
            )
        found = []
        for xs in zip(*parts, strict=True):
            aligned = self.backbone.align(list(xs))
            check_sources([f"source/{name}" for name in batch], aligned)
            found.append(samples.concat(aligned))
        return found

    def project(self, views: Sequence[Any]) -> list[Any]:
        """What the head makes of each view; all pass through backbone and head as one batch."""
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
        """Checks that the strategy can train; labels and methods are not asked for."""
        self.open_stages()  # a run that goes on within an epoch does not start it
        self.finetuning.check(self, by_domain(self.trainer.train_dataloader, DataLoader))
        StagedModule.on_train_start(self)

    # Evaluation

    def validation_step(self, batch: Domains, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Keeps the features of the first loader, and measures the objective on held-out samples."""
        if dataloader_idx > 0:
            return
        ((name, part),) = batch.items()
        part = as_batch(part)
        plain, rest = (part.x[0], part.x[1:]) if self.views > 1 else (part.x, part.x)
        self._keep(plain, part.y)
        self._measure({name: Batch(rest)}, batch_idx, "val")

    def test_step(self, batch: Domains, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Keeps the features; the objective is measured where it takes samples as they are."""
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
            return  # nothing to compare it with
        with torch.random.fork_rng():  # the same numbers in each validation, and training's go on as if nothing were
            torch.manual_seed(batch_idx)
            loss = reduce(torch.add, self.objective(*views).values())
        mean = getattr(self, f"{split}_loss")
        mean.update(loss.expand(count))
        self.log(f"{split}/loss", mean, metric_attribute=f"{split}_loss", batch_size=count, add_dataloader_idx=False)

    def on_validation_epoch_end(self) -> None:
        """Asks what the features are worth, and whether they have collapsed."""
        super().on_validation_epoch_end()
        self._worth("val")

    def on_test_epoch_end(self) -> None:
        """Asks what the features are worth."""
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
                    "epoch %d: the features have collapsed to one direction (%s/spread %.2g; spread evenly it is 1), "
                    "so they tell samples apart no more; lower --model.optimizer.lr, augment more, or take another "
                    "pretraining",
                    self.current_epoch,
                    split,
                    found["spread"],
                )

    def measures(self, features: Tensor, y: Any) -> dict[str, float]:
        """Numbers by name that say what features (N, D) of a split are worth, beside their labels, None without."""
        found = {"spread": spread(features)}
        if isinstance(y, Tensor) and {"classes", "values"} & self.schema["y"].keys():
            y = y.float() if self.class_names is None else y
            sound = bool(features.isfinite().all())
            found["knn"] = knn(features, y, NEIGHBOURS, TEMPERATURE) if sound else float("nan")
        return found

    def on_predict_start(self) -> None:
        """Refuses.

        Raises:
            UserError: Always.
        """
        raise UserError(
            f"predict: {type(self).__name__} has learnt features and no labels; write the features by `tl embed --run "
            "RUN`, or train a task on them by `tl fit --model.backbone.weights RUN`"
        )

    def show(self, title: str, images: Tensor) -> None:
        """Writes images (N, 1 or 3, H, W) in [0, 1] into TensorBoard, 8 in a row."""
        from torchvision.utils import make_grid

        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger) and self.trainer.is_global_zero:
                grid = make_grid(images[:SHOWN].float().cpu().clamp(0, 1))
                logger.experiment.add_image(title, grid, self.trainer.global_step)


def spread(features: Tensor) -> float:
    """`sqrt(D) mean_d std(f_d / |f|)` of (N, D): 1 where directions are spread evenly, 0 where all are one.

    As Chen and He (SimSiam, CVPR 2021) watch for collapse.
    """
    unit = F.normalize(features.float())
    return float(unit.std(0, unbiased=False).mean() * unit.shape[1] ** 0.5)


class CollateViews(Collate):
    """Makes a batch of samples ((view, ...), y, index): each view becomes a tree of its own."""

    def __call__(self, samples: Sequence[tuple[Any, ...]]) -> Any:
        """Returns the batch; samples without views, as `tl test` reads them, stay as they are."""
        batch = super().__call__([(None, *rest) for _, *rest in samples])
        xs = [x for x, *_ in samples]
        if isinstance(xs[0], tuple):
            return batch._replace(x=tuple(self.prepare(view) for view in zip(*xs, strict=True)))
        return batch._replace(x=self.prepare(xs))


def input_kind(backbone: Backbone, schema: Mapping[str, Any]) -> str:
    """What inputs are, image or numeric, by the schema, or by the backbone where nothing is said.

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
            f"model: this pretraining takes images or rows of numbers, not {', '.join(x) or 'what nobody knows'}; take "
            "SimCLR, VICReg or DINO with transforms of your own, --data.augment"
        )
    return kind
