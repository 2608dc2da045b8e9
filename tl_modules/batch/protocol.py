"""What a method, a strategy or a checkpoint may ask of the module that holds it, so that none of them imports it.

`TransferModule` (module.py) and `Backbone` (backbones/base.py) implement these classes and document their members.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from tl_modules.batch.output import DomainView


class AbstractBackbone(nn.Module, ABC):
    """Maps raw input to features, in stages."""

    out_features: int
    random: bool
    pretrained: Any

    @abstractmethod
    def stages(self) -> list[nn.Module]:
        """Returns the parts from input to output."""


class AbstractTransferModule(LightningModule, ABC):
    """A backbone, a head, a fine-tuning strategy and methods, for a task."""

    monitor: tuple[str, str]
    classes: ClassVar[bool]
    num_outputs: int
    backbone: AbstractBackbone
    head: nn.Module
    finetuning: Any
    num_stages: int
    trainable: range
    backbone_lr: float
    optimizer: Any
    lr_scheduler: Any
    head_transferred: bool
    save: str
    left_out: str | None

    @property
    @abstractmethod
    def progress(self) -> float:
        """Returns the share of the run's optimizer steps that are done."""

    @abstractmethod
    def look(self, batch: Any) -> dict[str, DomainView]:
        """Runs all domains of a batch through backbone and head."""

    @abstractmethod
    def see(self, x: Tensor, domain: str = "target") -> DomainView:
        """Runs other inputs of one domain through backbone and head."""

    @abstractmethod
    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Returns the task's loss of each sample."""

    @abstractmethod
    def loss_weight(self, y: Tensor) -> Tensor | None:
        """Returns how much each sample's loss counts."""

    @abstractmethod
    def closed_form(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns weight and bias of a linear head, where the task has them in closed form."""

    @abstractmethod
    def named_methods(self) -> list[tuple[str, Any]]:
        """Returns the methods with the names under which they are logged."""

    @abstractmethod
    def strategy_name(self) -> str:
        """Returns the class name of the strategy."""

    @abstractmethod
    def will_train(self, part: nn.Module) -> bool:
        """Returns whether a part of the backbone trains now or later."""

    @abstractmethod
    def keeps_statistics(self) -> bool:
        """Returns whether BatchNorm keeps its running statistics."""

    @abstractmethod
    def task_description(self) -> dict[str, Any]:
        """Returns the task and its labels as plain data."""
