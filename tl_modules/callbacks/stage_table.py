"""The table of stages: what trains, how fast, in which mode. Shown at the start and whenever it changes."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from tl_modules.base import TransferModule


class StageTable(Callback):
    """Prints a row per named parameter group: trains or frozen, parameters, learning rate, mode."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, bool]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table if what is open has changed."""
        if not isinstance(pl_module, TransferModule) or not trainer.is_global_zero:
            return
        # callbacks come before the module's own hook, which opens this epoch's stages
        pl_module.finetuning.apply(pl_module, trainer.current_epoch)
        groups: list[dict[str, Any]] = trainer.optimizers[0].param_groups
        now = [(g.get("name", str(i)), any(p.requires_grad for p in g["params"])) for i, g in enumerate(groups)]
        if now == self.shown:
            return
        self.shown = now
        modes = {f"stage_{i}": stage for i, stage in enumerate(pl_module.backbone.stages())}
        # a default strategy is a lazy instance, whose class has a prefix
        strategy = type(pl_module.finetuning).__name__.removeprefix("LazyInstance_")
        table = Table(title=f"epoch {trainer.current_epoch}: {strategy}", title_justify="left")
        for column, justify in (("stage", "left"), ("trains", "left"), ("parameters", "right"), ("lr", "right")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        table.add_column("mode")
        for group, (name, trains) in reversed(list(zip(groups, now, strict=True))):
            part = modes.get(name, pl_module.head)
            # a stage is a bare list, whose own flag says nothing
            training = any(m.training for m in list(part.modules())[1:] or [part])
            count = sum(p.numel() for p in group["params"])
            rate = f"{group['lr']:.2g}" if trains else "-"
            table.add_row(name, "yes" if trains else "frozen", f"{count:,}", rate, "train" if training else "eval")
        bar = getattr(trainer.progress_bar_callback, "progress", None)
        (bar.console if bar is not None else Console()).print(table)  # a live bar must make room
