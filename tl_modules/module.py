"""The straight line: a batch goes through backbone, head and loss terms on this one page.

    batch {"source": (x, y), "target": (x, None)}
      -> look:   backbone -> features -> head -> output            a DomainView of the source(s) and of the target
      -> terms:  the task's loss on every labelled view, + weight * method(source view, target view)
      -> sum

A plain target is fine-tuning; labelled source and target are joint training, L_S + target_weight * L_T; a labelled
source beside an unlabelled target is adaptation. No switch tells them apart: the batch does.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, ClassVar, Literal, cast

import torch
from jsonargparse import lazy_instance  # type: ignore[attr-defined]
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from tl_modules.backbones.base import Backbone
from tl_modules.batch.cached import CachedActivations, align_cached
from tl_modules.batch.current_domain import passing
from tl_modules.batch.output import DomainView, by_domain, check_sources, joinable, statistics_kept
from tl_modules.batch.protocol import AbstractTransferModule
from tl_modules.batch.samples import alike, concat
from tl_modules.checkpoints import contents
from tl_modules.errors import UserError, short
from tl_modules.finetuning.averaging import keep_exact
from tl_modules.finetuning.base import FineTuning
from tl_modules.finetuning.freezing import Full
from tl_modules.finetuning.head_start import start_head
from tl_modules.finetuning.optimizer import WarmupCosine, configure
from tl_modules.heads import Head, LinearHead
from tl_modules.methods.base import Method, reaches
from tl_modules.methods.schedules import Weight, at
from tl_modules.methods.terms import LossMean, Terms

# ours leaves the batches of a datamodule of ours as they are
warnings.filterwarnings("ignore", ".*overridden `on_before_batch_transfer` in `LightningModule`")
log = logging.getLogger(__name__)
HeadCallable = Callable[[int, int], Head]
Batch = Mapping[str, tuple[Tensor | CachedActivations, Tensor | None]]


class TransferModule(AbstractTransferModule):
    """A pretrained backbone and a task head, trained as the fine-tuning strategy and the methods say.

    A task subclasses this and writes `loss`, `metrics`, `predict` and `table`. Backbone, head, strategy and methods are
    composed.

    Args:
        backbone: Raw input -> features.
        num_outputs: Width of the head; `tl fit` takes it from the data.
        class_names: Names of the outputs; `tl fit` takes them from the data.
        head: Class or function of (in_features, out_features).
        finetuning: Which stages train when, and how fast.
        methods: Further terms of the loss.
        optimizer: Class or function of the parameter groups; its learning rate is the head's.
        lr_scheduler: Class or function of the optimizer; stepped each epoch (WarmupCosine, OneCycleLR and CyclicLR:
            each step). None: the learning rates stay as they are.
        target_weight: lambda in L_S + lambda L_T, where both domains are labelled, a number or a `Schedule`.
        source_weight: The weight of L_S; with 0 the source's labels train nothing.
        save: "all", or "trainable": checkpoints leave out the parameters that never train, and loading one needs the
            backbone's pretrained weights again (a fingerprint makes sure that they are the same).
    """

    monitor: tuple[str, str] = ("val/loss", "min")
    backbone: Backbone
    finetuning: FineTuning
    classes: ClassVar[bool] = False  # whether `output` are logits of classes

    def __init__(
        self,
        backbone: Backbone,
        num_outputs: int,
        class_names: list[str] | None = None,
        head: HeadCallable = LinearHead,
        finetuning: FineTuning = lazy_instance(Full),  # noqa: B008 - plain data until it is built
        methods: list[Method] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=1e-2),
        lr_scheduler: LRSchedulerCallable | None = WarmupCosine,
        target_weight: Weight = 1.0,
        source_weight: Weight = 1.0,
        save: Literal["all", "trainable"] = "all",
    ) -> None:
        super().__init__()
        if class_names is not None and len(class_names) != num_outputs:
            raise UserError(f"class_names: {len(class_names)} names for num_outputs {num_outputs}")
        self.backbone = backbone
        self.num_outputs = num_outputs
        self.class_names = class_names
        self.head: nn.Module = head(backbone.out_features, num_outputs)
        self.finetuning = finetuning
        self.num_stages = len(backbone.stages())
        self.trainable = range(self.num_stages)
        self.methods = nn.ModuleList(methods or [])
        self.backbone_lr = finetuning.relative_lr(backbone.random)
        self.reached: set[str] = set()  # the methods whose gradient has been seen to come to something that trains
        self.adapts = False  # whether training has more than one domain, or one without labels
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.save = save
        self.left_out: str | None = None  # a fingerprint of what checkpoints leave out, once one is written
        self.task_weight = {"source": source_weight, "target": target_weight}
        self.val_metrics = self.metrics().clone(prefix="val/")
        self.test_metrics = self.metrics().clone(prefix="test/")
        self.val_loss, self.test_loss = LossMean(), LossMean()
        self.terms = Terms()
        self.head_transferred = self._transfer_head()
        # what changes the backbone comes before what copies it
        for _, method in sorted(self.named_methods(), key=lambda named: not named[1].changes_backbone):
            if method.needs_classes and not self.classes:
                which, task = type(method).__name__, type(self).__name__
                raise UserError(f"methods: {which} works on class probabilities, which {task} lacks")
            method.attach(self)
        finetuning.prepare(self)

    # What a task writes

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The task's loss of each sample, (B,), from outputs (B, num_outputs) and labels (B, ...)."""
        raise NotImplementedError

    def closed_form(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Weight (num_outputs, D) and bias (num_outputs,) of a linear head for features (N, D) and labels (N, ...).

        None: there is no closed form, and the head starts at random.
        """
        return None

    def loss_weight(self, y: Tensor) -> Tensor | None:
        """How much each sample's loss counts in a mean, (B,), e.g. its class's weight; None: all the same."""
        return None

    def metrics(self) -> MetricCollection:
        """The metrics of a split, updated with `predict(output)` and the labels."""
        raise NotImplementedError

    def predict(self, output: Tensor) -> Tensor:
        """Outputs (B, num_outputs) -> what a user wants: probabilities, values, masks."""
        raise NotImplementedError

    def table(self, prediction: Tensor) -> dict[str, list[Any]]:
        """Predictions (B, ...) -> columns of `tl predict`'s CSV, B values each."""
        raise NotImplementedError

    def decide(self, prediction: Tensor) -> Tensor:
        """What of predictions (B, ...) is compared with labels: class numbers (B,), or the values themselves."""
        return prediction.argmax(1) if self.classes else prediction

    def score(self, decisions: Tensor, y: Tensor) -> float:
        """The task's first metric, that of `monitor`, of decisions and labels."""
        metric = self.metrics()[type(self).monitor[0].removeprefix("val/")]
        return float(metric(decisions.long() if self.classes else decisions, y))

    # The straight line

    def forward(self, x: Tensor) -> Tensor:
        """Raw input (B, ...) -> outputs (B, num_outputs)."""
        features = single(self.backbone(x))
        with self._full_precision():
            return cast(Tensor, self.head(features))

    def look(self, batch: Batch) -> dict[str, DomainView]:
        """A view of the source, of several sources together, and one of the target; all pass in one batch."""
        xs = align_cached(joinable([x for x, _ in batch.values()]))
        owners = [name.partition("/")[0] for name in batch]
        rows = [(owner, len(x)) for owner, x in zip(owners, xs, strict=True)]
        if len(xs) == 1 or alike(xs):
            features = list(torch.split(self._features(concat(xs), rows), [count for _, count in rows]))
        else:  # BatchNorm sees those that cannot be joined one after the other
            check_sources(list(batch), xs)
            features = [self._features(x, [row]) for x, row in zip(xs, rows, strict=True)]
        own = {owner: [i for i, name in enumerate(owners) if name == owner] for owner in owners}
        joined = {owner: concat([features[i] for i in places]) for owner, places in own.items()}
        with self._full_precision():
            outputs = torch.split(self.head(concat(list(joined.values()))), [len(f) for f in joined.values()])
        ys = [y for _, y in batch.values()]
        views = {}
        for (owner, places), output in zip(own.items(), outputs, strict=True):
            y = None if any(ys[i] is None for i in places) else concat([ys[i] for i in places])
            parts = tuple(rows[i][1] for i in places)
            view = DomainView(concat([xs[i] for i in places]), y, joined[owner], output, parts)
            if y is not None:
                with self._full_precision():
                    view.loss, view.weight = self.losses(output, y)
            views[owner] = view
        return views

    def _features(self, x: Tensor | CachedActivations, rows: list[tuple[str, int]]) -> Tensor:
        with passing(rows):
            return single(x.features() if isinstance(x, CachedActivations) else self.backbone(x))

    def see(self, x: Tensor, domain: str = "target") -> DomainView:
        """Another look at inputs (B, ...) of one domain, e.g. augmented or mixed ones, in the run's precision.

        In training it moves no running statistics: BatchNorm predicts with those of the data as it is.
        """
        precision = self.trainer.precision_plugin.forward_context() if self._trainer else nullcontext()
        with precision, statistics_kept(self) if self.training else nullcontext():
            return self.look({domain: (x, None)})[domain]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Names the domains of batches from loaders that are not ours."""
        return by_domain(batch, Tensor)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of the task's and the methods' terms."""
        views = self.look(batch)
        source, target = views.get("source"), views.get("target")
        with self._full_precision():
            for _, method in self.named_methods():
                method.reweight(self, source, target)
            terms = {
                f"task/{domain}": at(self.task_weight[domain], self) * view.mean_loss
                for domain, view in views.items()
                if view.y is not None and self.task_weight[domain] != 0
            }
            for name, method in self.named_methods():
                term = method(self, source, target)
                if term is not None:
                    self._check_reach(name, method, term)
                    terms[name] = at(method.weight, self) * term
        if not terms:
            raise UserError(
                "source_weight, target_weight: nothing is left of the loss, since the labelled domains have weight 0 "
                "and no method adds a term"
            )
        total = reduce(torch.add, terms.values())
        self.terms.add({"loss": total, **terms}, max(len(view.output) for view in views.values()))
        return total

    def losses(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """The task's loss (B,) and weight (B,) or None of each sample.

        Raises:
            UserError: The task's `loss` gives something else.
        """
        loss, weight = self.loss(output, y), self.loss_weight(y)
        for name, given in (("loss", loss), ("loss_weight", weight)):
            if given is not None and given.shape != (len(y),):
                raise UserError(
                    f"{type(self).__name__}.{name} gives a tensor of shape {tuple(given.shape)} for {len(y)} samples; "
                    'let it give one value for each, (B,), e.g. by reduction="none"'
                )
        return loss, weight

    def _check_reach(self, name: str, method: Method, term: Tensor) -> None:
        """Refuses a term that moves nothing, once everything is open that ever will be.

        Raises:
            UserError: Its gradient comes to no parameter of backbone or head that trains.
        """
        if name in self.reached or self.trainable != self._trainable_stages(self.finetuning.end):
            return
        self.reached.add(name)
        if not reaches(term, (*self.backbone.parameters(), *self.head.parameters())):
            who = type(method).__name__
            raise UserError(
                f"methods: {who} would do nothing, since its term depends on the features alone and "
                f"{self.strategy_name()} keeps frozen what makes them; take a strategy that opens stages, e.g. "
                f"LastStages, or leave {who} out"
            )

    @property
    def progress(self) -> float:
        """The share of the run's optimizer steps that are done, in [0, 1]; 0 outside of a run.

        Raises:
            UserError: The run has no end.
        """
        if self._trainer is None:
            return 0.0
        if math.isinf(steps := self.total_steps):
            raise UserError(
                "trainer: a weight that moves with training and a strategy in fractions of the run need its end; "
                "give --trainer.max_epochs or max_steps"
            )
        return min(1.0, self.global_step / steps)

    @property
    def total_steps(self) -> float:
        """The optimizer steps of the whole run; infinite without an end, or outside of a run."""
        return math.inf if self._trainer is None else float(self.trainer.estimated_stepping_batches)

    def _full_precision(self) -> AbstractContextManager[Any]:
        """Head, losses and methods are small and need their digits: mixed precision ends at the features."""
        mixed = torch.is_autocast_enabled(self.device.type)
        return torch.autocast(self.device.type, enabled=False) if mixed else nullcontext()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Logs the epoch's mean of each term, before the validation that ends it."""
        if self.trainer.is_last_batch or self.trainer.global_step == self.trainer.max_steps:
            means = {f"train/{name}": mean for name, mean in self.terms.means().items()}
            self.log_dict(means, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, DomainView]:
        """Loss and metrics on the labelled validation split; the views also of what has no labels."""
        return self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, DomainView]:
        """Loss and metrics on the test split."""
        return self._evaluate(batch, "test", dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> tuple[Tensor, Tensor | None]:
        """Predictions, and the row numbers that stand in the labels' place."""
        ((x, rows),) = batch.values()
        return self.predict(self(x)), rows

    def _evaluate(self, batch: Batch, split: str, number: int) -> dict[str, DomainView]:
        """Loss and metrics of a batch of a split; those of a second labelled loader end in /dataloader_idx_1."""
        ((domain, view),) = self.look(batch).items()
        if view.y is None:
            return {domain: view}
        of_metrics, of_loss = (f"{split}_{what}{f'_{number}' if number else ''}" for what in ("metrics", "loss"))
        if not hasattr(self, of_loss):
            setattr(self, of_metrics, getattr(self, f"{split}_metrics").clone().to(self.device))
            setattr(self, of_loss, LossMean().to(self.device))
        metrics: MetricCollection = getattr(self, of_metrics)
        metrics.update(self.predict(view.output), view.y)
        # not sync_dist: over ranks of uneven size it divides by a batch size rounded down (Lightning issue 21859)
        getattr(self, of_loss).update(view.loss, view.weight)
        measures = {of_loss: getattr(self, of_loss)}
        measures |= {f"{of_metrics}.{key}": m for key, m in metrics.items(keep_base=True, copy_state=False)}
        for attribute, measure in measures.items():
            name = f"{split}/{attribute.rpartition('.')[2] if '.' in attribute else 'loss'}"
            name += f"/dataloader_idx_{number}" if number else ""
            # with its attribute, which Lightning would look for once only
            self.log(name, measure, metric_attribute=attribute, batch_size=len(view.y), add_dataloader_idx=False)
        return {domain: view}

    def on_validation_epoch_end(self) -> None:
        """Stops at a validation loss that is not finite.

        Raises:
            UserError: It is nan or infinite.
        """
        self._check_finite(self.val_loss, "val/loss")

    def on_test_epoch_end(self) -> None:
        """Stops at a test loss that is not finite.

        Raises:
            UserError: It is nan or infinite.
        """
        self._check_finite(self.test_loss, "test/loss")

    def _check_finite(self, mean: LossMean, name: str) -> None:
        if mean.update_called and not mean.compute().isfinite():
            when = f"epoch {self.current_epoch}: " if self.trainer.state.fn == "fit" else ""
            raise UserError(
                f"{when}{name} is not finite: the outputs of some sample are nan or infinite; lower the learning rate, "
                "pass --trainer.gradient_clip_val 1 or --trainer.precision 32-true"
            )

    # At full speed

    def __setattr__(self, name: str, value: Any) -> None:
        """Lightning notes the running hook's name fifty times a step, and a network's own way costs 2 us each time."""
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    # Fine-tuning

    def named_methods(self) -> list[tuple[str, Method]]:
        """The methods with the names under which they are logged, e.g. l2sp; a second one of a class is l2sp_2."""
        seen: Counter[str] = Counter()
        named = []
        for method in self.methods:
            assert isinstance(method, Method)
            name = type(method).__name__.lower()
            seen[name] += 1
            named.append((name if seen[name] == 1 else f"{name}_{seen[name]}", method))
        return named

    def now(self) -> float:
        """How far training is, in the strategy's unit."""
        if self._trainer is None or self.finetuning.unit == "epochs":
            return self.current_epoch
        return self.progress if self.finetuning.unit == "fraction" else self.global_step

    def strategy_name(self) -> str:
        """The class of the strategy; a default one is a lazy instance, whose class has a prefix."""
        return type(self.finetuning).__name__.removeprefix("LazyInstance_")

    def will_train(self, part: nn.Module) -> bool:
        """Whether a part of the backbone is in a stage that is open now or opens later."""
        stages, trainable = self.backbone.stages(), self._trainable_stages(self.finetuning.end)
        return any(part is module for number in trainable for module in stages[number].modules())

    def keeps_statistics(self) -> bool:
        """Whether BatchNorm keeps its running statistics, unless the strategy says: in plain fine-tuning."""
        changed = any(method.changes_backbone for _, method in self.named_methods())
        return not (self.backbone.random or self.adapts or changed)

    def _trainable_stages(self, position: float) -> range:
        return self.finetuning.trainable_stages(position, self.num_stages)

    def open_stages(self) -> None:
        """Freezes and unfreezes stages as the position in training says."""
        self.trainable = self._trainable_stages(self.now())
        self.finetuning.apply(self, self.now())

    def on_train_epoch_start(self) -> None:
        """Opens what this epoch opens."""
        self.terms = Terms()
        self.open_stages()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Opens what this step opens."""
        if self.finetuning.unit != "epochs" and self._trainable_stages(self.now()) != self.trainable:
            self.open_stages()

    def train(self, mode: bool = True) -> TransferModule:
        """Train or eval mode; what is closed stays in eval mode."""
        super().train(mode)
        if mode:
            self.open_stages()
        return self

    def configure_optimizers(self) -> Any:
        """Named groups with discriminative learning rates, and the scheduler at its interval."""
        return configure(self)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Leaves out a plateau's, which Lightning would step after the epoch's checkpoint (its pull request 7877)."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def on_train_epoch_end(self) -> None:
        """Steps a plateau's scheduler, so that the epoch's checkpoint has it; not if `max_steps` cuts it short."""
        if not self.trainer.is_last_batch:
            return
        for config in self.trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and config.monitor in self.trainer.callback_metrics:
                cast(Any, config.scheduler).step(self.trainer.callback_metrics[config.monitor])

    def on_fit_start(self) -> None:
        """Keeps averages of the weights exact where nothing trains."""
        keep_exact(self)

    def on_train_start(self) -> None:
        """Stops before the first step at what could only go wrong later.

        Raises:
            UserError: A method lacks a domain, there is nothing to learn from, or the strategy cannot train.
        """
        domains: dict[str, Any] = by_domain(self.trainer.train_dataloader, DataLoader)
        labels = [getattr(getattr(loader, "dataset", None), "label", "y") for loader in domains.values()]
        self.adapts = len(domains) > 1 or "none" in labels
        self.open_stages()  # a run that goes on within an epoch does not start it
        for _, method in self.named_methods():
            method.check(self, list(domains))
        if set(labels) == {"none"} and not self.methods:
            raise UserError(
                "methods: the training data has no labels and there is no method, so there is nothing to learn from; "
                "give one, e.g. --model.methods+=SHOT, or open the labels by --data.target_labels true"
            )
        self.finetuning.check(self, domains)
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, WarmupCosine):
                config.scheduler.bind(self.total_steps)
        start_head(self, domains)

    def setup(self, stage: str) -> None:
        """Refuses data whose classes are not the model's, and strategies that cannot keep what this one promises.

        Raises:
            UserError: The class names differ; parameters would be split; BatchNorm synchronised on CPUs.
        """
        if isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
            raise UserError(
                "strategy: FSDP, ModelParallel and DeepSpeed split the parameters over the processes, which freezing "
                "by stages and exact checkpoints do not support; pass --trainer.strategy ddp"
            )
        if getattr(self.trainer.strategy, "_layer_sync", None) and self.trainer.strategy.root_device.type == "cpu":
            raise UserError("sync_batchnorm: it needs GPUs; leave --trainer.sync_batchnorm out")
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        if names is not None and self.class_names is not None and list(names) != self.class_names:
            raise UserError(f"class_names: the data's are {short(names)}, the model's are {short(self.class_names)}")

    def _transfer_head(self) -> bool:
        """Takes the source run's head along where task, labels and shape are the same, and says so."""
        pretrained = self.backbone.pretrained
        if pretrained is None or pretrained.task != self.task_description():
            return False
        if {k: v.shape for k, v in pretrained.head.items()} != {k: v.shape for k, v in self.head.state_dict().items()}:
            return False
        self.head.load_state_dict(pretrained.head)
        log.info("head from %s too: the task and its labels are the same", pretrained.origin)
        return True

    def task_description(self) -> dict[str, Any]:
        """The task and its labels, as plain data."""
        return {"task": type(self).__name__, "class_names": self.class_names, "num_outputs": self.num_outputs}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the task is, and leaves out what never trains if `save` says so."""
        contents.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fills in what was left out; lets a learning rate given now win, at the schedule's present fraction of it."""
        contents.restore(self, checkpoint)


def single(features: Tensor) -> Tensor:
    """Features that mixed precision has made half ones, in single precision."""
    return features.float() if torch.is_autocast_enabled(features.device.type) else features
