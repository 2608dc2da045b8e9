"""Shows what trains, and stops a run in which something trains that should not, or the other way round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tl_modules.base import TransferModule
from tl_modules.errors import UserError

OFF = "; pass --audit false to go on all the same"


class FreezeAudit(Callback):
    """Prints the table of stages at the start and at each change, and checks it against what happens.

    A run stops when a parameter trains but is in no optimizer, is in the optimizer twice, is open for a whole epoch
    without ever getting a gradient, or when a weight or buffer of a closed stage has changed at an epoch's end.

    Args:
        check: Whether to check; the table is shown all the same.
    """

    def __init__(self, check: bool = True) -> None:
        self.check = check
        self.depth: int | None = None
        self.sums: dict[str, list[int]] = {}
        self.epoch_starts = False
        self.waiting: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an earlier fit."""
        self.depth, self.sums, self.waiting = None, {}, {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that goes on within an epoch does not come here: it can't speak of the whole epoch."""
        self.epoch_starts = True

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """At an epoch's first step, waits for gradients; at a change of what is open, checks and shows it."""
        if not isinstance(pl_module, TransferModule):
            return
        if self.epoch_starts:
            self.epoch_starts = False
            self.waiting = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        if pl_module.depth == self.depth:
            return
        self.depth = pl_module.depth
        if self.check:
            check_optimizer(pl_module, trainer.optimizers)
            self.sums = {name: self.sums.get(name, sums) for name, sums in checksums(pl_module).items()}
        if trainer.is_global_zero:
            bar = getattr(trainer.progress_bar_callback, "progress", None)
            (bar.console if bar is not None else Console()).print(table(pl_module, trainer))  # a live bar makes room

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Crosses out what has a gradient; after an epoch's first step, usually nothing is left."""
        if self.waiting:
            self.waiting = {name: p for name, p in self.waiting.items() if p.grad is None}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that what was closed has not moved and that what was open could.

        Raises:
            UserError: It has; it could not.
        """
        if not self.check or not isinstance(pl_module, TransferModule):
            return
        for name, sums in checksums(pl_module).items():
            if name in self.sums and sums != self.sums[name]:
                raise UserError(f"freeze audit: {name} is closed, but its weights or buffers changed in epoch "
                                f"{trainer.current_epoch}{OFF}")  # fmt: skip
        if self.waiting and trainer.is_last_batch:
            raise UserError(
                f"freeze audit: {_some(self.waiting)} was open for the whole epoch {trainer.current_epoch} but never "
                f"got a gradient: the loss does not depend on it{OFF}"
            )


def check_optimizer(module: TransferModule, optimizers: list[torch.optim.Optimizer]) -> None:
    """Every parameter that trains is in an optimizer, once; compared by identity.

    Raises:
        UserError: One is not, or twice.
    """
    held = Counter(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    names = dict(module.named_parameters())
    if lost := {name: p for name, p in names.items() if p.requires_grad and not held[id(p)]}:
        raise UserError(f"freeze audit: {_some(lost)} trains but is in no optimizer{OFF}")
    if twice := {name: p for name, p in names.items() if held[id(p)] > 1}:
        raise UserError(
            f"freeze audit: {_some(twice)} is in the optimizer {held[id(next(iter(twice.values())))]} times{OFF}"
        )


def checksums(module: TransferModule) -> dict[str, list[int]]:
    """A sum over the bits of each tensor of the closed stages, by stage."""
    closed = len(module.backbone.stages()) - module.depth
    found: dict[str, list[Tensor]] = {}
    for number, stage in enumerate(module.backbone.stages()[:closed]):
        found[f"stage_{number}"] = [_bits(t) for t in (*stage.parameters(), *stage.buffers())]
    every = [each for sums in found.values() for each in sums]
    values = iter(torch.stack(every).tolist() if every else [])  # one wait for the device
    return {name: [next(values) for _ in sums] for name, sums in found.items()}


def _bits(tensor: Tensor) -> Tensor:
    flat = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return flat.view(kind).sum(dtype=torch.int64)


def table(module: TransferModule, trainer: Trainer) -> Table:
    """A row per named parameter group: stage, parameters, trains, in the optimizer, learning rate, mode."""
    groups: list[dict[str, Any]] = trainer.optimizers[0].param_groups
    parts = dict(module.named_methods()) | {f"stage_{i}": stage for i, stage in enumerate(module.backbone.stages())}
    # a default strategy is a lazy instance, whose class has a prefix
    strategy = type(module.finetuning).__name__.removeprefix("LazyInstance_")
    where = f"epoch {trainer.current_epoch}" + (
        f", step {trainer.global_step}" if module.finetuning.unit != "epochs" else ""
    )
    shown = Table(title=f"{where}: {strategy}", title_justify="left")
    for column in ("stage", "trains", "parameters", "in optimizer", "lr", "mode"):
        shown.add_column(column, justify="right" if column in ("parameters", "in optimizer", "lr") else "left")
    for group in reversed(groups):
        name = group.get("name", "?")
        part: Any = parts.get(name, module.head)
        trains = any(p.requires_grad for p in group["params"])
        # a stage is a bare list, whose own flag says nothing
        training = any(m.training for m in list(part.modules())[1:] or [part])
        shown.add_row(
            name,
            "yes" if trains else "frozen",
            f"{sum(p.numel() for p in part.parameters()):,}",
            f"{sum(p.numel() for p in group['params']):,}",
            f"{group['lr']:.2g}" if trains else "-",
            "train" if training else "eval",
        )
    return shown


def _some(named: Mapping[str, Tensor]) -> str:
    first = next(iter(named))
    return first if len(named) == 1 else f"{first} (and {len(named) - 1} more)"
