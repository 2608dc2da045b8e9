"""The interface of the module for the parts that it holds, so that none of them imports it.

`Backbone` (backbones/base.py) and `TransferModule` (module.py) implement these classes.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

from torch import Tensor, nn

from tl_modules.batch.evaluation import EvaluatedTask
from tl_modules.batch.output import DomainOutput
from tl_modules.batch.samples import Collate


class BaseBackbone(nn.Module, ABC):
    """Maps raw samples to features, in stages."""

    out_features: Any
    random: bool
    pruned: bool
    closed: int
    pretrained: Any
    prepare: Callable[[Sequence[Any]], Any]
    data_defaults: Mapping[str, Any] = {}

    @property
    @abstractmethod
    def width(self) -> int:
        """Returns D of `pooled_features`."""

    @abstractmethod
    def stages(self) -> list[nn.Module]:
        """Returns the parts from input to output."""

    @abstractmethod
    def pooled_features(self, features: Any) -> Tensor:
        """Returns one vector per sample, (B, D)."""

    @abstractmethod
    def align(self, xs: list[Any]) -> list[Any]:
        """Converts the inputs of several domains to one form."""

    def prepares_like(self, other: BaseBackbone) -> bool:
        """Returns whether another backbone prepares inputs in the same way, so that it can use this one's inputs."""
        one, two = (getattr(each.prepare, "__func__", each.prepare) for each in (self, other))
        with suppress(Exception):  # what cannot be pickled counts as different
            return bool(one == two or pickle.dumps(one) == pickle.dumps(two))
        return False


class BaseTransferModule(EvaluatedTask, ABC):
    """A backbone, a head, a fine-tuning strategy and methods for a task."""

    backbone: BaseBackbone
    bottleneck: nn.Module
    finetuning: Any
    num_stages: int
    trainable: range
    reached: set[str]
    backbone_lr: float
    optimizer: Any
    lr_scheduler: Any
    head_transferred: bool
    checkpoint_weights: str
    left_out: str | None

    @property
    def width(self) -> int:
        """Returns D of the vectors that methods get, `DomainOutput.pooled`."""
        layer = next(self.bottleneck.children(), None)
        return self.backbone.width if layer is None else cast(nn.Linear, layer).out_features

    def network_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of backbone and head, without those of the methods."""
        return [p for part in (self.backbone, self.bottleneck, self.head) for p in part.parameters()]

    @property
    @abstractmethod
    def progress(self) -> float:
        """Returns the share of the run's optimizer steps that are done."""

    @property
    @abstractmethod
    def total_steps(self) -> float:
        """Returns the optimizer steps of the whole run, which may be infinite."""

    @property
    def collate(self) -> Collate:
        """Returns the function that makes a `Batch` of raw samples: `prepare` of the backbone, `label` of the task."""
        return Collate(self.backbone.prepare, self.label)

    @property
    def data_defaults(self) -> dict[str, Any]:
        """Returns values for data arguments that are left open: images as the weights expect them.

        Images are augmented only if the whole backbone trains from the start: frozen stages run once, and on their
        features augmentation gains nothing (docs/results/fine-tuning.md).
        """
        frozen = len(self.trainable_stages()) < self.num_stages
        return {**self.backbone.data_defaults, **({"augment": "none"} if frozen else {})}

    @abstractmethod
    def forward_extra(self, x: Any, domain: str = "target") -> DomainOutput:
        """Runs other inputs of one domain through backbone and head."""

    @abstractmethod
    def named_methods(self) -> list[tuple[str, Any]]:
        """Returns the methods with the names under which they are logged."""

    @abstractmethod
    def stages(self) -> list[nn.Module]:
        """Returns the stages of the backbone, and of a head that has stages."""

    @abstractmethod
    def trainable_stages(self, position: float | None = None) -> range:
        """Returns the stages that train at a position; None is the last position."""

    @abstractmethod
    def strategy_name(self) -> str:
        """Returns the class name of the strategy."""

    @abstractmethod
    def will_train(self, part: nn.Module) -> bool:
        """Returns whether a part of the backbone trains now or later."""

    @abstractmethod
    def keeps_statistics(self) -> bool:
        """Returns whether BatchNorm keeps its running statistics."""
