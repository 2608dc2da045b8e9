"""Shows what trains, and stops a run if something trains that should be frozen, or the other way round."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor

from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.errors import UserError
from tl_modules.finetuning.summary import summary

OFF = "; pass --audit false to continue anyway"


class FreezeAudit(Callback):
    """Prints a summary at the start and each unfreezing later, and checks them against what actually happens.

    A run stops if a parameter trains but is in no optimizer, is in the optimizer twice, is trainable for a whole epoch
    without ever getting a gradient, or if a frozen weight or buffer has changed at the end of an epoch, at the end of
    the run or in a checkpoint, whatever has changed it.

    Args:
        check: Whether to check; the summary is shown in any case.
    """

    def __init__(self, check: bool = True) -> None:
        self.check = check
        self.trainable: range | None = None
        self.sums: dict[str, list[int]] = {}
        self.epoch_starts = False
        self.waiting: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resets the state of an earlier fit."""
        self.trainable, self.sums, self.waiting = None, {}, {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the gradient check of a whole epoch; not called when a run resumes mid-epoch."""
        self.epoch_starts = True

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Starts the gradient check of an epoch; when stages unfreeze, checks the optimizer and prints them."""
        if not isinstance(pl_module, BaseTransferModule):
            return
        if self.epoch_starts:
            self.epoch_starts = False
            self.waiting = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        if pl_module.trainable == self.trainable:
            return
        before, self.trainable = self.trainable, pl_module.trainable
        if self.check:
            check_optimizer(pl_module, trainer.optimizers)
            self.sums = {name: self.sums.get(name, sums) for name, sums in checksums(pl_module).items()}
        if trainer.is_global_zero:
            bar = getattr(trainer.progress_bar_callback, "progress", None)
            console = bar.console if bar is not None else Console(width=None if sys.stdout.isatty() else 120)
            said = summary(pl_module, trainer) if before is None else _opened(pl_module, trainer, before)
            console.print(said, highlight=False, soft_wrap=before is not None)  # a live bar makes room

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Stops waiting for parameters with a gradient; after an epoch's first step usually none are left."""
        if self.waiting:
            self.waiting = {name: p for name, p in self.waiting.items() if p.grad is None}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that frozen tensors have not changed, and that trainable parameters have got a gradient.

        Raises:
            UserError: A frozen tensor has changed, or a trainable parameter has never got a gradient.
        """
        if not self.check or not isinstance(pl_module, BaseTransferModule):
            return
        self.compare(checksums(pl_module), f"changed in epoch {trainer.current_epoch}")
        if self.waiting and trainer.is_last_batch:
            raise UserError(
                f"freeze audit: {_some(self.waiting)} was trainable for all of epoch {trainer.current_epoch} but never "
                f"got a gradient: the loss does not depend on it{OFF}"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks frozen tensors after all other callbacks have run.

        Raises:
            UserError: A callback has changed a frozen tensor.
        """
        if self.check and isinstance(pl_module, BaseTransferModule) and self.sums:
            self.compare(checksums(pl_module), "changed at the end of training, by a callback")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Checks frozen tensors that a checkpoint holds in place of the module's own, e.g. an average.

        Raises:
            UserError: A frozen tensor differs in the checkpoint.
        """
        if not self.check or not isinstance(pl_module, BaseTransferModule) or not self.sums:
            return
        state, closed = checkpoint["state_dict"], pl_module.finetuning.frozen_tensors(pl_module)
        held = {n: {k: state.get(k, t).detach() for k, t in named.items()} for n, named in closed.items()}
        own = {t.data_ptr() for named in closed.values() for t in named.values()}
        if any(t.data_ptr() not in own for named in held.values() for t in named.values()):
            self.compare(sums_of(held), "differs in the checkpoint, because of a callback")

    def compare(self, now: Mapping[str, list[int]], what: str) -> None:
        """Compares checksums with the earlier ones.

        Raises:
            UserError: A checksum differs.
        """
        for name, sums in now.items():
            if name in self.sums and sums != self.sums[name]:
                raise UserError(f"freeze audit: {name} is frozen, but one of its weights or buffers {what}{OFF}")


def check_optimizer(module: BaseTransferModule, optimizers: list[torch.optim.Optimizer]) -> None:
    """Checks that every parameter that trains is in an optimizer exactly once, by identity.

    Raises:
        UserError: A parameter is in none, or in several groups.
    """
    held = Counter(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    names = dict(module.named_parameters())
    if lost := {name: p for name, p in names.items() if p.requires_grad and not held[id(p)]}:
        raise UserError(f"freeze audit: {_some(lost)} trains but is in no optimizer{OFF}")
    if twice := {name: p for name, p in names.items() if held[id(p)] > 1}:
        raise UserError(
            f"freeze audit: {_some(twice)} is in the optimizer {held[id(next(iter(twice.values())))]} times{OFF}"
        )


def checksums(module: BaseTransferModule) -> dict[str, list[int]]:
    """Returns a checksum of each tensor that must not change now, by stage."""
    return sums_of(module.finetuning.frozen_tensors(module))


def sums_of(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, list[int]]:
    """Returns a checksum of each tensor, by group."""
    every = [_bits(t) for named in tensors.values() for t in named.values()]
    values = torch.stack(every).tolist() if every else []  # a single device synchronisation
    ends = [0, *itertools.accumulate(map(len, tensors.values()))]
    return {name: values[first:last] for name, (first, last) in zip(tensors, itertools.pairwise(ends), strict=True)}


def _bits(tensor: Tensor) -> Tensor:
    flat: Any = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    parts = flat.view(kind).reshape(-1).split(1 << 22)  # in parts, since a sum first casts its input to 8 bytes each
    total: Tensor = torch.stack([part.sum(dtype=torch.int64) for part in parts]).sum()
    return total


def _opened(module: BaseTransferModule, trainer: Trainer, before: range) -> str:
    names = [f"stage_{number}" for number in module.trainable if number not in before]
    where = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
    return f"{where}: unfreezes {' and '.join(names)}"


def _some(named: Mapping[str, Tensor]) -> str:
    first = next(iter(named))
    return first if len(named) == 1 else f"{first} (and {len(named) - 1} more)"
