"""The straight line: a batch goes through backbone, head and loss terms on this one page.

    batch {"source": (x, y), "target": (x, None)}
      -> look:   backbone -> features -> head -> output            a DomainView of the source(s) and of the target
      -> terms:  the task's loss on every labelled view, + weight * method(source view, target view)
      -> sum

A plain target is fine-tuning; labelled source and target are joint training, L_S + target_weight * L_T; a labelled
source beside an unlabelled target is adaptation. No switch tells them apart: the batch does.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, ClassVar, Literal, cast

import torch
from jsonargparse import lazy_instance  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau
from torchmetrics import MeanMetric, MetricCollection

from tl_modules.backbones.base import Backbone
from tl_modules.cached import Cached
from tl_modules.errors import UserError
from tl_modules.finetuning.base import FineTuning
from tl_modules.finetuning.freezing import Full
from tl_modules.methods.base import Method
from tl_modules.rows import passing
from tl_modules.schedules import Weight, at
from tl_modules.terms import Terms
from tl_modules.views import DomainView, alike, join, joinable, statistics_kept

log = logging.getLogger(__name__)
HeadCallable = Callable[[int, int], nn.Module]
Batch = Mapping[str, tuple[Tensor | Cached, Tensor | None]]


class TransferModule(LightningModule):
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
        optimizer: Class or function of the parameter groups.
        lr_scheduler: Class or function of the optimizer; stepped each epoch (OneCycleLR and CyclicLR: each step).
        target_weight: lambda in L_S + lambda L_T, where both domains are labelled, a number or a `Schedule`.
        source_weight: The weight of L_S; with 0 the source's labels train nothing.
        save: "all", or "trainable": checkpoints leave out the parameters that never train, and loading one needs the
            backbone's pretrained weights again (a fingerprint makes sure that they are the same).
    """

    monitor: tuple[str, str] = ("val/loss", "min")
    classes: ClassVar[bool] = False  # whether `output` are logits of classes

    def __init__(
        self,
        backbone: Backbone,
        num_outputs: int,
        class_names: list[str] | None = None,
        head: HeadCallable = nn.Linear,
        finetuning: FineTuning = lazy_instance(Full),  # noqa: B008 - plain data until it is built
        methods: list[Method] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-2),
        lr_scheduler: LRSchedulerCallable | None = None,
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
        self.head = head(backbone.out_features, num_outputs)
        self.finetuning = finetuning
        self.num_stages = len(backbone.stages())
        self.depth = self.num_stages
        self.methods = nn.ModuleList(methods or [])
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.save = save
        self._fingerprint: str | None = None
        self.task_weight = {"source": source_weight, "target": target_weight}
        self.val_metrics = self.metrics().clone(prefix="val/")
        self.test_metrics = self.metrics().clone(prefix="test/")
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
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
        """The task's loss, a scalar, from outputs (B, num_outputs) and labels (B, ...)."""
        raise NotImplementedError

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
        xs = joinable([x for x, _ in batch.values()])
        owners = [name.partition("/")[0] for name in batch]
        rows = [(owner, len(x)) for owner, x in zip(owners, xs, strict=True)]
        if len(xs) == 1 or alike(xs):
            features = list(torch.split(self._features(join(xs), rows), [count for _, count in rows]))
        else:  # BatchNorm sees those that cannot be joined one after the other
            features = [self._features(x, [row]) for x, row in zip(xs, rows, strict=True)]
        own = {owner: [i for i, name in enumerate(owners) if name == owner] for owner in owners}
        joined = {owner: join([features[i] for i in places]) for owner, places in own.items()}
        with self._full_precision():
            outputs = torch.split(self.head(join(list(joined.values()))), [len(f) for f in joined.values()])
        ys = [y for _, y in batch.values()]
        views = {}
        for (owner, places), output in zip(own.items(), outputs, strict=True):
            y = None if any(ys[i] is None for i in places) else join([ys[i] for i in places])
            parts = tuple(rows[i][1] for i in places)
            views[owner] = DomainView(join([xs[i] for i in places]), y, joined[owner], output, parts)
        return views

    def _features(self, x: Tensor | Cached, rows: list[tuple[str, int]]) -> Tensor:
        with passing(rows):
            return single(x.features() if isinstance(x, Cached) else self.backbone(x))

    def see(self, x: Tensor, domain: str = "target") -> DomainView:
        """Another look at inputs (B, ...) of one domain, e.g. augmented or mixed ones, in the run's precision.

        In training it moves no running statistics: BatchNorm predicts with those of the data as it is.
        """
        precision = self.trainer.precision_plugin.forward_context() if self._trainer else nullcontext()
        with precision, statistics_kept(self) if self.training else nullcontext():
            return self.look({domain: (x, None)})[domain]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of the task's and the methods' terms."""
        views = self.look(batch)
        with self._full_precision():
            terms = {
                f"task/{domain}": at(self.task_weight[domain], self) * self.loss(view.output, view.y)
                for domain, view in views.items()
                if view.y is not None and self.task_weight[domain] != 0
            }
            for name, method in self.named_methods():
                weight = at(method.weight, self)
                terms[name] = weight * method(self, views.get("source"), views.get("target"))
        total = reduce(torch.add, terms.values())
        self.terms.add({"loss": total, **terms}, max(len(view.output) for view in views.values()))
        return total

    @property
    def progress(self) -> float:
        """The share of the run's optimizer steps that are done, in [0, 1]; 0 outside of a run.

        Raises:
            UserError: The run has no end.
        """
        if self._trainer is None:
            return 0.0
        if (steps := self.trainer.estimated_stepping_batches) == float("inf"):
            raise UserError(
                "trainer: a weight that moves with training and a strategy in fractions of the run need its end; "
                "give --trainer.max_epochs or max_steps"
            )
        return min(1.0, self.global_step / steps)

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
        return self._evaluate(batch, self.val_metrics, self.val_loss)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, DomainView]:
        """Loss and metrics on the test split."""
        return self._evaluate(batch, self.test_metrics, self.test_loss)

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor | None]:
        """Predictions, and the row numbers that stand in the labels' place."""
        ((x, rows),) = batch.values()
        return self.predict(self(x)), rows

    def _evaluate(self, batch: Batch, metrics: MetricCollection, mean: MeanMetric) -> dict[str, DomainView]:
        ((domain, view),) = self.look(batch).items()
        if view.y is None:
            return {domain: view}
        metrics.update(self.predict(view.output), view.y)
        # not sync_dist: over ranks of uneven size it divides by a batch size rounded down (Lightning issue 21859)
        mean.update(self.loss(view.output, view.y), len(view.y))
        self.log(f"{metrics.prefix}loss", mean, batch_size=len(view.y), add_dataloader_idx=False)
        self.log_dict(metrics, batch_size=len(view.y), add_dataloader_idx=False)
        return {domain: view}

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

    def open_stages(self) -> None:
        """Opens what is open now."""
        self.depth = self.finetuning.depth(self.now(), self.num_stages)
        self.finetuning.apply(self, self.now())

    def on_train_epoch_start(self) -> None:
        """Opens what this epoch opens."""
        self.terms = Terms()
        self.open_stages()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Opens what this step opens."""
        if self.finetuning.unit != "epochs" and self.finetuning.depth(self.now(), self.num_stages) != self.depth:
            self.open_stages()

    def train(self, mode: bool = True) -> TransferModule:
        """Train or eval mode; what is closed stays in eval mode."""
        super().train(mode)
        if mode:
            self.open_stages()
        return self

    def configure_optimizers(self) -> Any:
        """Named groups with discriminative learning rates, and the scheduler at its interval."""
        optimizer = fused(self.optimizer(list(self.finetuning.param_groups(self))))
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_scale"]
            group["configured_lr"] = group["lr"]
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        each_step = isinstance(scheduler, OneCycleLR | CyclicLR)
        if each_step:
            _scale_cycle(optimizer, scheduler)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": "step" if each_step else "epoch"}
        if isinstance(scheduler, ReduceLROnPlateau):
            # without a name it watches the loss, or the task's metric where that grows
            config["monitor"] = getattr(
                scheduler, "monitor", "val/loss" if scheduler.mode == "min" else self.monitor[0]
            )
        return {"optimizer": optimizer, "lr_scheduler": config}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Leaves out a plateau's, which Lightning would step after the epoch's checkpoint (its pull request 7877)."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def on_train_epoch_end(self) -> None:
        """Steps a plateau's scheduler, so that the epoch's checkpoint has it."""
        for config in self.trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and config.monitor in self.trainer.callback_metrics:
                cast(Any, config.scheduler).step(self.trainer.callback_metrics[config.monitor])

    def on_train_start(self) -> None:
        """Stops before the first step at what could only go wrong later.

        Raises:
            UserError: A method lacks a domain, DDP would lose stages that open later, or BatchNorm would see a batch
                of one.
        """
        self.open_stages()  # a run that goes on within an epoch does not start it
        loaders = self.trainer.train_dataloader
        domains = dict(loaders) if isinstance(loaders, Mapping) else {}
        for _, method in self.named_methods():
            method.check(self, list(domains))
        hidden = bool(domains) and all(view.label == "none" for view in map(_view, domains.values()) if view)
        if hidden and not self.methods:
            raise UserError(
                "methods: the training data has no labels and there is no method, so there is nothing to learn from; "
                "give one, e.g. --model.methods+=SHOT, or open the labels by --data.target_labels true"
            )
        if not any(p.requires_grad for p in self.parameters()):
            name = type(self.finetuning).__name__.removeprefix("LazyInstance_")
            raise UserError(
                f"finetuning: nothing trains, since a method keeps the head and {name} closes the backbone; take Full"
            )
        opens_later = self.finetuning.opens_later(self.num_stages)
        strategy = self.trainer.strategy
        plain_ddp = isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters")
        if opens_later and plain_ddp:
            raise UserError(
                f"finetuning: {type(self.finetuning).__name__} opens stages during training, which plain ddp cannot"
                " follow; pass --trainer.strategy ddp_find_unused_parameters_true"
            )
        for loader in domains.values():
            self._check_last_batch(loader)

    def _check_last_batch(self, loader: Any) -> None:
        trained = any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) and any(p.requires_grad for p in m.parameters())
            for m in self.modules()
        )
        size, samples = getattr(loader, "batch_size", None), len(getattr(loader, "sampler", ()))
        if trained and (size == 1 or (size and not loader.drop_last and samples % size == 1)):
            raise UserError(
                f"batch_size: {samples} training samples in batches of {size} leave a batch of one, on which BatchNorm "
                "cannot train; choose another --data.batch_size or pass --data.drop_last true"
            )

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
            raise UserError(f"class_names: the data's are {_short(names)}, the model's are {_short(self.class_names)}")

    def _transfer_head(self) -> bool:
        """Takes the source run's head along where task, labels and shape are the same, and says so."""
        pretrained = self.backbone.pretrained
        if pretrained is None or pretrained.task != self._task():
            return False
        if {k: v.shape for k, v in pretrained.head.items()} != {k: v.shape for k, v in self.head.state_dict().items()}:
            return False
        self.head.load_state_dict(pretrained.head)
        log.info("head from %s too: the task and its labels are the same", pretrained.origin)
        return True

    def _task(self) -> dict[str, Any]:
        return {"task": type(self).__name__, "class_names": self.class_names, "num_outputs": self.num_outputs}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the task is, so that the next transfer knows whether the labels are shared."""
        checkpoint["transfer"] = self._task()
        if self.save == "trainable":
            left_out = self._never_trains()
            self._fingerprint = self._fingerprint or fingerprint(left_out)  # what never trains never changes
            checkpoint["left_out"] = self._fingerprint
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in left_out}

    def _never_trains(self) -> dict[str, Tensor]:
        """The backbone's parameters that the strategy never opens."""
        stages = self.backbone.stages()
        closed = len(stages) - self.finetuning.depth(self.finetuning.end, len(stages))
        held = {id(p) for stage in stages[:closed] for p in stage.parameters()}
        return {name: p.detach() for name, p in self.named_parameters() if id(p) in held}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fills in what was left out; lets a learning rate given now win, at the schedule's present fraction of it.

        Raises:
            UserError: The checkpoint belongs to a backbone with other weights.
        """
        if "left_out" in checkpoint:
            left_out = {k: v for k, v in self._never_trains().items() if k not in checkpoint["state_dict"]}
            if checkpoint["left_out"] != fingerprint(left_out):
                raise UserError(
                    "checkpoint: it was saved with save: trainable on a backbone with other weights than this one; "
                    "pass the same --model.backbone.weights"
                )
            checkpoint["state_dict"] = left_out | checkpoint["state_dict"]
        states = checkpoint.get("optimizer_states") or []
        if not states or self._trainer is None or not self.trainer.training:
            return
        fresh = self.configure_optimizers()  # the Trainer builds its own only after this hook
        fresh = fresh["optimizer"] if isinstance(fresh, dict) else fresh
        names = [
            [(g.get("name"), len(g["params"])) for g in groups]
            for groups in (states[0]["param_groups"], fresh.param_groups)
        ]
        if names[0] != names[1]:
            raise UserError(
                f"checkpoint: its optimizer has {_groups(names[0])}, this model's has {_groups(names[1])}; go on with "
                "the same backbone, head and methods, or start a new run with --model.backbone.weights"
            )
        for old, new in zip(states[0]["param_groups"], fresh.param_groups, strict=True):
            ratio = new["configured_lr"] / old.get("configured_lr", new["configured_lr"])
            for key in {"lr", "initial_lr", "configured_lr"} & old.keys():
                old[key] *= ratio
        for scheduler in checkpoint.get("lr_schedulers", []):
            if "base_lrs" in scheduler:
                scheduler["base_lrs"] = [g.get("initial_lr", g["lr"]) for g in states[0]["param_groups"]]


def _view(loader: Any) -> Any:
    dataset = getattr(loader, "dataset", None)
    return dataset if hasattr(dataset, "label") else None


def single(features: Tensor) -> Tensor:
    """Features that mixed precision has made half ones, in single precision."""
    return features.float() if torch.is_autocast_enabled(features.device.type) else features


def fused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Lets an optimizer that can update all parameters in one kernel do so, unless another way was asked for."""
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    given = optimizer.defaults
    asked = given.get("foreach") is not None or given.get("capturable") or given.get("differentiable")
    if given.get("fused", False) is None and not asked and all(p.is_floating_point() for p in everything):
        for group in optimizer.param_groups:
            group["fused"] = True
    if all(p.device.type == "cpu" for p in everything):
        # torch asks the driver for a GPU in each step, to refuse one in a graph (its Adam and AdamW; 0.1 ms)
        cast(Any, optimizer)._accelerator_graph_capture_health_check = lambda: None
    return optimizer


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, types and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(cast(Any, tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _scale_cycle(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Gives each group its share of a cycle's learning rates, which these schedulers set to one value for all."""
    for number, group in enumerate(optimizer.param_groups):
        for key in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():
            group[key] *= group["lr_scale"]
        for rates in (scheduler.base_lrs, getattr(scheduler, "max_lrs", None)):
            if rates is not None:
                rates[number] *= group["lr_scale"]


def _groups(groups: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({count} tensors)" for name, count in groups)


def _short(names: Any) -> str:
    return ", ".join(map(str, list(names)[:6])) + (", ..." if len(names) > 6 else "")
