"""The hooks of a module that freezes, unfreezes and optimises its stages according to its strategy."""

from __future__ import annotations

import math
from typing import Any, cast

from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tl_modules.batch.compat import attached, synchronizes_batchnorm, tiny_inputs_in_float32
from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.errors import UserError, short
from tl_modules.finetuning.averaging import keep_exact
from tl_modules.finetuning.base import FineTuning
from tl_modules.finetuning.optimizer import WarmupCosine, configure


class StagedModule(BaseTransferModule):
    """Freezes and unfreezes the stages of its backbone, and of a head that has stages, in Lightning's hooks."""

    finetuning: FineTuning
    adapts = False  # whether training has more than one domain, or one without labels
    at_end = False  # whether values that change during a run are held at their final value

    def stages(self) -> list[nn.Module]:
        """Returns the stages from the input on: the backbone's, then those of a pretrained head."""
        return [*self.backbone.stages(), *getattr(self.head, "stages", list)()]

    @property
    def progress(self) -> float:
        """The share of the run's optimizer steps that are done, in [0, 1]; 0 outside a run.

        Raises:
            UserError: The run has no end.
        """
        if self.at_end:
            return 1.0
        if not attached(self):
            return 0.0
        if math.isinf(steps := self.total_steps):
            raise UserError(
                "trainer: a changing weight, or a strategy in fractions of the run, needs the run's end; "
                "pass --trainer.max_epochs or max_steps"
            )
        return min(1.0, self.global_step / steps)

    @property
    def total_steps(self) -> float:
        """The optimizer steps of the whole run; infinite without an end, or outside a run."""
        return float(self.trainer.estimated_stepping_batches) if attached(self) else math.inf

    def position(self) -> float:
        """Returns the current position in training, in the strategy's unit."""
        if self.at_end:
            return float(self.finetuning.last_position)
        if not attached(self) or self.finetuning.unit == "epochs":
            return self.current_epoch
        return self.progress if self.finetuning.unit == "fraction" else self.global_step

    def strategy_name(self) -> str:
        """Returns the class name of the strategy; a default is a lazy instance, whose class name has a prefix."""
        return type(self.finetuning).__name__.removeprefix("LazyInstance_")

    def trainable_stages(self, position: float | None = None) -> range:
        """Returns the stages that train at a position; None is the largest one."""
        return self.finetuning.open_stages(self, position)

    def will_train(self, part: nn.Module) -> bool:
        """Returns whether a part of the backbone is in a stage that trains now or later."""
        stages = self.stages()
        return any(part is module for number in self.trainable_stages() for module in stages[number].modules())

    def keeps_statistics(self) -> bool:
        """Returns the default for whether BatchNorm keeps its running statistics: in plain fine-tuning."""
        changed = any(method.changes_backbone for _, method in self.named_methods())
        return not (self.backbone.random or self.adapts or changed)

    def open_stages(self) -> None:
        """Freezes and unfreezes stages according to the position in training."""
        self.trainable = self.trainable_stages(self.position())
        self.finetuning.apply(self, self.position())

    def on_train_epoch_start(self) -> None:
        """Unfreezes the stages of this epoch."""
        self.open_stages()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Unfreezes the stages of this step."""
        if self.finetuning.unit != "epochs" and self.trainable_stages(self.position()) != self.trainable:
            self.open_stages()

    def train(self, mode: bool = True) -> Any:
        """Sets train or eval mode; frozen stages stay in eval mode."""
        super().train(mode)
        if mode:
            self.open_stages()
        return self

    def configure_optimizers(self) -> Any:
        """Returns named groups with discriminative learning rates, and the scheduler with its interval."""
        return configure(self)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Skips ReduceLROnPlateau, which `on_train_epoch_end` steps.

        Lightning would step it after the checkpoint is saved (Lightning pull request 7877).
        """
        if not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def on_train_epoch_end(self) -> None:
        """Steps ReduceLROnPlateau before the epoch's checkpoint is saved; not if `max_steps` cuts the epoch short."""
        if not self.trainer.is_last_batch:
            return
        for config in self.trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and config.monitor in self.trainer.callback_metrics:
                cast(Any, config.scheduler).step(self.trainer.callback_metrics[config.monitor])

    def on_fit_start(self) -> None:
        """Also keeps averages of frozen weights exact, and gradients on tiny inputs."""
        super().on_fit_start()
        tiny_inputs_in_float32(self)
        keep_exact(self)

    def on_train_start(self) -> None:
        """Passes the length of the run to the scheduler."""
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, WarmupCosine):
                config.scheduler.bind(self.total_steps)

    def setup(self, stage: str) -> None:
        """Rejects data with other class names, and options of the Trainer that this module does not support.

        Raises:
            UserError: The class names differ, or an option cannot work.
        """
        if isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
            raise UserError(
                "strategy: FSDP, ModelParallel and DeepSpeed shard the parameters over the processes, which freezing "
                "by stages and exact checkpoints do not support; pass --trainer.strategy ddp"
            )
        if synchronizes_batchnorm(self.trainer.strategy) and self.trainer.strategy.root_device.type == "cpu":
            raise UserError("sync_batchnorm: it needs GPUs; leave --trainer.sync_batchnorm out")
        for option in ("accumulate_grad_batches", "limit_train_batches") if stage == "fit" else ():
            if (value := getattr(self.trainer, option)) <= 0:
                raise UserError(f"{option}: {value} must be above 0, or nothing is trained")
        if (clip := getattr(self.trainer, "gradient_clip_val", None)) is not None and clip < 0:
            raise UserError(f"gradient_clip_val: {clip} must not be negative")
        if any(isinstance(each, LearningRateFinder) for each in cast(Any, self.trainer).callbacks):
            raise UserError("callbacks: LearningRateFinder supports only one learning rate; use `tl lr-find`")
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        if names is not None and self.class_names is not None and list(names) != self.class_names:
            raise UserError(f"class_names: the data's are {short(names)}, the model's are {short(self.class_names)}")
