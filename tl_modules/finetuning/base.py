"""Defines a fine-tuning strategy: a pure function from the position in training to the stages that train.

    stages        [ 0 ][ 1 ][ 2 ][ 3 ][ head ]
    range(4, 4)     -    -    -    -     x        x trains; - is frozen: no gradient, and in eval mode, so that
    range(2, 4)     -    -    x    x     x        BatchNorm keeps its running statistics
    range(0, 4)     x    x    x    x     x

No state is stored: a resumed run derives the trainable stages from its epoch or step. Every parameter is in the
optimizer, in a named group, from the first step, and every parameter that will ever train requires a gradient when the
Trainer wraps the module, so that DDP sees it. Parameters of the backbone that are in no stage are new, like the head,
and always train. The strategy is applied at each epoch's start and in every `train()` (`StagedModule`, staged.py);
after a validation Lightning restores every submodule's mode. The strategies themselves are in freezing.py and lora.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, Literal

from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from tl_modules.batch.compat import BatchNorm, finds_unused_parameters
from tl_modules.batch.protocol import BaseBackbone, BaseTransferModule
from tl_modules.errors import UserError

__all__ = ["FineTuning"]

Unit = Literal["epochs", "steps", "fraction"]
# the rate that a new head needs destroys pretrained weights; if few of them train, a higher rate is safe
PRETRAINED_LR, PART_LR = 1 / 30, 1 / 10


class FineTuning:
    """Decides which stages of the backbone train; the head and the methods always do.

    A subclass implements `trainable_stages`, and `trains` if only some parameters of these stages are to train. Stages
    may be unfrozen during training, but never frozen again.

    Attributes:
        unit: The unit of the position.
        pretrained_lr: The default of `backbone_lr` for a pretrained backbone.
        merged: Whether the parameters that it has added to the network have been merged into the weights.

    Args:
        lr_decay: Learning rate of a stage relative to the one above it, from the head down (discriminative learning
            rates, Howard and Ruder, ACL 2018); 1 gives all stages the same.
        backbone_lr: Learning rate of the backbone relative to the head's. None: if the backbone is pretrained, 1/30, or
            1/10 in strategies that train little of it; if it starts at random, 1.
        batch_norm: "train" normalises by batch statistics in trainable stages and updates the running ones; "eval" uses
            the running statistics of the pretrained weights, which little data cannot improve. None is "eval" if a
            pretrained backbone is fine-tuned on one labelled domain, and "train" otherwise. Layers without weights,
            which only standardise, always update.
    """

    unit: Unit = "epochs"
    pretrained_lr: float = PRETRAINED_LR
    merged: bool = False

    def __init__(
        self,
        lr_decay: float = 1.0,
        backbone_lr: float | None = None,
        batch_norm: Literal["train", "eval"] | None = None,
    ) -> None:
        if not 0 < lr_decay <= 1:
            raise UserError(f"lr_decay: {lr_decay} must be in (0, 1]")
        if backbone_lr is not None and not 0 < backbone_lr <= 1:
            raise UserError(f"backbone_lr: {backbone_lr} must be in (0, 1]")
        self.lr_decay, self.backbone_lr, self.batch_norm = lr_decay, backbone_lr, batch_norm

    def relative_lr(self, random: bool) -> float:
        """Returns the backbone's learning rate relative to the head's, given whether its weights start at random."""
        if self.backbone_lr is not None:
            return self.backbone_lr
        return 1.0 if random else self.pretrained_lr

    def trainable_stages(self, position: float, stages: int) -> range:
        """Returns which stages train, numbered from the input.

        Args:
            position: The position in training, in `unit`: the epoch (from 0), the optimizer steps taken, or their
                fraction.
            stages: Number of stages of the backbone.
        """
        raise NotImplementedError

    def trains(self, name: str, owner: nn.Module) -> bool:
        """Returns whether a parameter of a trainable stage trains.

        Args:
            name: Its name in the module that holds it, e.g. "bias".
            owner: The module that holds it.
        """
        return True

    @property
    def last_position(self) -> float:
        """The last position: what is frozen there is frozen for the whole run."""
        return 1.0 if self.unit == "fraction" else float(sys.maxsize)

    def open_stages(self, module: BaseTransferModule, position: float | None = None) -> range:
        """Returns the stages of a module that train at a position; None is the end.

        The first stages, which the backbone keeps frozen, are not included.
        """
        closed = module.backbone.closed
        found = self.trainable_stages(self.last_position if position is None else position, module.num_stages - closed)
        return range(found.start + closed, found.stop + closed)

    def opens_later(self, stages: int) -> bool:
        """Returns whether a stage that is frozen at the start will train later."""
        return self.trainable_stages(self.last_position, stages) != self.trainable_stages(0, stages)

    def extend(self, module: BaseTransferModule) -> None:
        """Adds new parameters to the stages; called once, before methods copy anything from the module."""

    def merge(self, module: BaseTransferModule) -> None:
        """Merges the parameters that `extend` has added into the weights; `merged` says whether there were any."""

    def parameters(self, stages: Sequence[nn.Module]) -> Iterator[tuple[int, nn.Parameter, bool]]:
        """Yields every parameter once: its first stage, the parameter, and whether it trains with the stage."""
        seen: set[int] = set()
        for number, stage in enumerate(stages):
            for owner in stage.modules():
                for name, parameter in owner.named_parameters(recurse=False):
                    if id(parameter) not in seen:
                        seen.add(id(parameter))
                        yield number, parameter, self.trains(name, owner)

    def prepare(self, module: BaseTransferModule) -> None:
        """Freezes permanently what never trains; called once, in the module's constructor.

        Raises:
            UserError: The strategy trains a kind of parameter that the backbone lacks.
        """
        stages = module.stages()
        trains = [each for *_, each in self.parameters(stages)]
        if trains and not any(trains):
            raise UserError(
                f"finetuning: {type(self).__name__} finds no parameter to train in {type(module.backbone).__name__}; "
                "use LastStages, or FeatureExtraction to train only the head"
            )
        self.apply(module, self.last_position)

    def check(self, module: BaseTransferModule, loaders: Mapping[str, Any]) -> None:
        """Rejects a run in which the strategy cannot train; called when training starts.

        Args:
            module: The module at the start.
            loaders: The training loaders, by domain.

        Raises:
            UserError: Nothing trains, DDP would miss stages that are unfrozen later, or BatchNorm would get a batch of
                one.
        """
        name = module.strategy_name()
        if not any(p.requires_grad for p in module.parameters()):
            raise UserError(
                f"finetuning: nothing trains, since a method freezes the head and {name} freezes the backbone; "
                "use FullFineTuning"
            )
        strategy = module.trainer.strategy
        plain_ddp = isinstance(strategy, DDPStrategy) and not finds_unused_parameters(strategy)
        if plain_ddp and self.opens_later(module.num_stages):
            raise UserError(
                f"finetuning: {name} unfreezes stages during training, which plain ddp does not support; pass "
                "--trainer.strategy ddp_find_unused_parameters_true"
            )
        if any(isinstance(m, BatchNorm) and any(p.requires_grad for p in m.parameters()) for m in module.modules()):
            for loader in loaders.values():
                _check_last_batch(loader)

    def apply(self, module: BaseTransferModule, position: float) -> None:
        """Freezes and unfreezes: sets requires_grad and, in training, train or eval mode."""
        stages = module.stages()
        trainable = self.open_stages(module, position)
        # modules in no stage (containers, a BatchNorm without parameters) are frozen until all stages train
        module.backbone.train(module.training and len(trainable) == len(stages))
        if len(stages) > len(module.backbone.stages()):  # a pretrained head; its parts outside stages are new
            module.head.train(module.training)
        for part in new_parts(module.backbone):
            part.train(module.training)
        for number, stage in enumerate(stages):
            stage.train(number in trainable and module.training)
        for number, parameter, trains in self.parameters(stages):
            parameter.requires_grad_(number in trainable and trains)
        if self.batch_norm == "eval" or (self.batch_norm is None and module.keeps_statistics()):
            for layer in module.backbone.modules():
                if isinstance(layer, BatchNorm) and layer.affine:
                    layer.eval()

    def param_groups(self, module: BaseTransferModule) -> Iterator[dict[str, Any]]:
        """Yields groups `head`, `bottleneck`, `fusion`, the methods' names, `stage_N`, with every parameter once.

        `lr_scale` multiplies the learning rate. A parameter that several parts share belongs to the first of them, in
        the order stages, head, methods. Parameters that do not train with their stage are left out.
        """
        stages = module.stages()
        of_stage: list[list[nn.Parameter]] = [[] for _ in stages]
        seen: set[int] = set()
        for number, parameter, trains in self.parameters(stages):
            seen.add(id(parameter))
            if trains:
                of_stage[number].append(parameter)
        # methods also hold networks that never train (a teacher, a copy of the pretrained network)
        methods = [(name, [p for p in m.parameters() if p.requires_grad]) for name, m in module.named_methods()]
        new = [("head", list(module.head.parameters())), ("bottleneck", list(module.bottleneck.parameters()))]
        new += [("fusion", new_parameters(module.backbone))]
        for name, parameters in (*new, *methods):
            own = [p for p in parameters if id(p) not in seen]
            seen |= {id(p) for p in own}
            if own:
                yield {"name": name, "params": own, "lr_scale": 1.0}
        for number in reversed(range(len(stages))):
            scale = module.backbone_lr * self.lr_decay ** (len(stages) - number)
            if of_stage[number]:
                yield {"name": f"stage_{number}", "params": of_stage[number], "lr_scale": scale}

    def frozen_tensors(self, module: BaseTransferModule) -> dict[str, dict[str, Tensor]]:
        """Returns the parameters and buffers that must not change now, by part and by name.

        While any stage is frozen, so is what belongs to no stage; the head is frozen if none of it trains.
        """
        stages = module.stages()
        stage_of: dict[int, int] = {}
        for number, stage in enumerate(stages):
            for tensor in (*stage.parameters(), *stage.buffers()):
                stage_of.setdefault(id(tensor), number)
        new = {id(p) for p in new_parameters(module.backbone)}
        head_is_frozen = not any(p.requires_grad for p in module.head.parameters())
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            number = stage_of.get(id(tensor), -1)
            part = None
            if id(tensor) in new:
                continue
            if name.startswith("backbone.") and number not in module.trainable and len(module.trainable) < len(stages):
                part = f"stage_{number}" if number >= 0 else "a part in no stage"
            elif number in module.trainable and isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                part = f"a part of stage_{number}"
            elif name.startswith("head.") and head_is_frozen:
                part = "head"
            if part:
                found.setdefault(part, {})[name] = tensor.detach()
        return found

    def never_trains(self, module: BaseTransferModule) -> dict[str, Tensor]:
        """Returns the backbone's parameters that are frozen for the whole run, by name."""
        stages = module.stages()
        trainable = self.open_stages(module)
        frozen = {id(p) for number, p, trains in self.parameters(stages) if number not in trainable or not trains}
        return {name: p.detach() for name, p in module.named_parameters() if id(p) in frozen}


def new_parameters(backbone: BaseBackbone) -> list[nn.Parameter]:
    """Lists the parameters of a backbone that are in no stage, and so are new."""
    staged = {id(p) for stage in backbone.stages() for p in stage.parameters()}
    return [p for p in backbone.parameters() if id(p) not in staged]


def new_parts(backbone: BaseBackbone) -> list[nn.Module]:
    """Lists the modules of a backbone that hold only new parameters."""
    new = {id(p) for p in new_parameters(backbone)}
    held = [(part, {*map(id, part.parameters())}) for part in backbone.modules()] if new else []
    return [part for part, own in held if own and own <= new]


def _check_last_batch(loader: Any) -> None:
    size, sampler = getattr(loader, "batch_size", None), getattr(loader, "sampler", None)
    samples = len(sampler) if isinstance(sampler, Sized) else 0
    if size == 1 or (size and not loader.drop_last and samples % size == 1):
        raise UserError(
            f"batch_size: {samples} training samples in batches of {size} leave a batch of one, on which BatchNorm "
            "cannot train; choose another --data.batch_size or pass --data.drop_last true"
        )
