"""The straight line: a batch goes through backbone, head and loss terms on this one page.

    batch {"source": (x, y), "target": (x, None)}
      -> look:   backbone -> features -> head -> output            one DomainView per domain
      -> terms:  the task's loss on every labelled view, + weight * method(source view, target view)
      -> sum

A plain target is fine-tuning; labelled source and target are joint training, L_S + target_weight * L_T; a labelled
source beside an unlabelled target is adaptation. No switch tells them apart: the batch does.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jsonargparse import lazy_instance  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from tl_modules.backbones.base import Backbone
from tl_modules.errors import UserError
from tl_modules.finetuning.base import FineTuning
from tl_modules.finetuning.freezing import Full
from tl_modules.methods.base import Method

log = logging.getLogger(__name__)
HeadCallable = Callable[[int, int], nn.Module]
Batch = Mapping[str, tuple[Tensor, Tensor | None]]


@dataclass
class DomainView:
    """What the network sees of one domain in one step.

    Attributes:
        x: The raw input, (B, ...).
        y: The labels, (B, ...), or None where they are hidden.
        features: (B, out_features).
        output: The head's output, (B, num_outputs).
    """

    x: Tensor
    y: Tensor | None
    features: Tensor
    output: Tensor


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
        target_weight: lambda in L_S + lambda L_T, where both domains are labelled.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/loss", "min")

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
        target_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if class_names is not None and len(class_names) != num_outputs:
            raise UserError(f"class_names: {len(class_names)} names for num_outputs {num_outputs}")
        self.backbone = backbone
        self.num_outputs = num_outputs
        self.class_names = class_names
        self.head = head(backbone.out_features, num_outputs)
        self.finetuning = finetuning
        self.methods = nn.ModuleList(methods or [])
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.task_weight = {"source": 1.0, "target": target_weight}
        self.val_metrics = self.metrics().clone(prefix="val/")
        self.test_metrics = self.metrics().clone(prefix="test/")
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.head_transferred = self._transfer_head()
        for _, method in self.named_methods():
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

    # The straight line

    def forward(self, x: Tensor) -> Tensor:
        """Raw input (B, ...) -> outputs (B, num_outputs)."""
        output: Tensor = self.head(self.backbone(x))
        return output

    def look(self, batch: Batch) -> dict[str, DomainView]:
        """One view per domain of the batch."""
        views = {}
        for domain, (x, y) in batch.items():
            features = self.backbone(x)
            views[domain] = DomainView(x, y, features, self.head(features))
        return views

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of the task's and the methods' terms."""
        views = self.look(batch)
        terms = {
            f"task/{domain}": self.task_weight[domain] * self.loss(view.output, view.y)
            for domain, view in views.items()
            if view.y is not None
        }
        for name, method in self.named_methods():
            terms[name] = method.weight * method(self, views.get("source"), views.get("target"))
        total = torch.stack(list(terms.values())).sum()
        size = max(len(view.output) for view in views.values())
        logged = {"train/loss": total, **{f"train/{name}": term for name, term in terms.items()}}
        self.log_dict(logged, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, DomainView]:
        """Loss and metrics on the validation split."""
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
        assert view.y is not None
        metrics.update(self.predict(view.output), view.y)
        # not sync_dist: over ranks of uneven size it divides by a batch size rounded down (Lightning issue 21859)
        mean.update(self.loss(view.output, view.y), len(view.y))
        self.log(f"{metrics.prefix}loss", mean, batch_size=len(view.y))
        self.log_dict(metrics, batch_size=len(view.y))
        return {domain: view}

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

    def on_train_epoch_start(self) -> None:
        """Opens what this epoch opens."""
        self.finetuning.apply(self, self.current_epoch)

    def train(self, mode: bool = True) -> TransferModule:
        """Train or eval mode; what is closed stays in eval mode."""
        super().train(mode)
        if mode:
            self.finetuning.apply(self, self.current_epoch)
        return self

    def configure_optimizers(self) -> Any:
        """Named groups with discriminative learning rates, and the scheduler at its interval."""
        optimizer = self.optimizer(list(self.finetuning.param_groups(self)))
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("lr_scale")
            group["configured_lr"] = group["lr"]
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        each_step = type(scheduler).__name__ in ("OneCycleLR", "CyclicLR")
        config: dict[str, Any] = {"scheduler": scheduler, "interval": "step" if each_step else "epoch"}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": config}

    def on_train_start(self) -> None:
        """Stops before the first step at what could only go wrong later.

        Raises:
            UserError: A method lacks a domain, DDP would lose stages that open later, or BatchNorm would see a batch
                of one.
        """
        loaders = self.trainer.train_dataloader
        domains = dict(loaders) if isinstance(loaders, Mapping) else {}
        for _, method in self.named_methods():
            for domain in method.needs:
                if domain not in domains:
                    raise UserError(
                        f"methods: {type(method).__name__} needs a {domain} domain in training, but the data has only "
                        f"{' and '.join(domains)}; give --data.{domain}"
                    )
        strategy = self.trainer.strategy
        opens_later = self.finetuning.opens_later(len(self.backbone.stages()))
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
        """Refuses data whose classes are not the model's.

        Raises:
            UserError: The class names differ.
        """
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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lets a learning rate given now win over the checkpoint's, at the schedule's present fraction of it."""
        states = checkpoint.get("optimizer_states") or []
        if not states or self._trainer is None or not self.trainer.training:
            return
        fresh = self.configure_optimizers()  # the Trainer builds its own only after this hook
        fresh = fresh["optimizer"] if isinstance(fresh, dict) else fresh
        for old, new in zip(states[0]["param_groups"], fresh.param_groups, strict=True):
            ratio = new["configured_lr"] / old.get("configured_lr", new["configured_lr"])
            for key in {"lr", "initial_lr", "configured_lr"} & old.keys():
                old[key] *= ratio
        for scheduler in checkpoint.get("lr_schedulers", []):
            if "base_lrs" in scheduler:
                scheduler["base_lrs"] = [g.get("initial_lr", g["lr"]) for g in states[0]["param_groups"]]


def _short(names: Any) -> str:
    return ", ".join(map(str, list(names)[:6])) + (", ..." if len(names) > 6 else "")
