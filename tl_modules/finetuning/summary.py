"""Summarises a run when it starts: what trains, from when and how fast, on which samples, for how long."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sized
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Group
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

from tl_modules.batch.output import by_domain
from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.finetuning.base import new_parameters
from tl_modules.finetuning.optimizer import WarmupCosine


def summary(module: BaseTransferModule, trainer: Trainer) -> Group:
    """Returns a rich table of what trains, and lines on the samples, the steps and the rates."""
    every, ever = sum(p.numel() for p in module.parameters()), 0
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("part", "parameters", "trains", "peak lr"):
        shown.add_column(column, justify="right" if column in ("parameters", "peak lr") else "left")
    parts: dict[str, nn.Module] = {f"stage_{i}": stage for i, stage in enumerate(module.stages())}
    parts["fusion"] = nn.ParameterList(new_parameters(module.backbone))
    parts |= {"bottleneck": module.bottleneck, "head": module.head} | dict(module.named_methods())
    # further parts of the module, e.g. a generator or a teacher
    parts |= {n: each for n, each in module.named_children() if n not in {*parts, "backbone", "methods"}}
    held = {id(p): group for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    for name, part in parts.items():
        is_stage = name.startswith("stage_")
        count = sum(p.numel() for p in part.parameters())
        own = [p for p in part.parameters() if id(p) in held and (is_stage or p.requires_grad)]
        opens = _opens(module, int(name.removeprefix("stage_"))) if is_stage else 0
        if not own or opens == math.inf:
            if count:
                shown.add_row(name, f"{count:,}", "frozen", "")
            continue
        group = held[id(own[0])]
        trained = sum(p.numel() for p in own)
        held = {key: group for key, group in held.items() if key not in set(map(id, own))}  # tied parameters count once
        ever += trained
        when = f"from {_unit(module)} {opens:,}" if opens else "yes"
        share = "" if trained == count else f", {trained:,} of them"
        shown.add_row(name, f"{count:,}", when + share, f"{_peak(group, trainer, module, opens):.2g}")
    title = f"{module.strategy_name()}: {ever:,} of {every:,} parameters train"
    lines = [_samples(trainer), _steps(module, trainer), _schedule(trainer)]
    return Group(title, shown, *lines)


def _unit(module: BaseTransferModule) -> str:
    return "epoch" if module.finetuning.unit == "epochs" else "step"


def _opens(module: BaseTransferModule, stage: int) -> float:
    """Returns the epoch or step, in the strategy's unit, in which a stage unfreezes; infinite if not in this run."""
    strategy, steps, epochs = module.finetuning, module.total_steps, module.trainer.max_epochs
    last = steps if strategy.unit != "epochs" else epochs if epochs is not None and epochs >= 0 else math.inf
    scale = steps if strategy.unit == "fraction" else 1.0

    def is_open(at: int) -> bool:
        return stage in strategy.open_stages(module, at / scale)

    end = int(min(last, 1e9)) - 1
    return bisect_left(range(end), True, key=is_open) if end >= 0 and is_open(end) else math.inf  # it stays trainable


def _peak(group: Mapping[str, Any], trainer: Trainer, module: BaseTransferModule, opens: float) -> float:
    """Returns the largest rate of a group."""
    rate = group.get("max_lr", group.get("configured_lr", group["lr"]))
    scheduler = next((config.scheduler for config in trainer.lr_scheduler_configs), None)
    steps = module.total_steps
    if isinstance(scheduler, WarmupCosine) and math.isfinite(steps):
        first = opens * steps / (trainer.max_epochs or 1) if module.finetuning.unit == "epochs" else opens
        rate *= scheduler.factor(max(int(first), math.ceil(scheduler.warmup * steps)))
    return float(rate)


def _samples(trainer: Trainer) -> str:
    """Describes the samples of each domain and split of the run."""
    found: dict[str, list[str]] = {}
    for name, loader in by_domain(trainer.train_dataloader, DataLoader).items():
        hidden = " without labels" if getattr(loader.dataset, "label", "y") == "none" else ""
        found.setdefault(name, []).append(f"{_count(loader)} train{hidden}")
    given = trainer.val_dataloaders
    for loader in given if isinstance(given, list) else [given] if given is not None else []:
        purpose = getattr(loader, "purpose", "val").removeprefix("target ")
        found.setdefault(getattr(loader, "domain", "target"), []).append(f"{_count(loader)} {purpose}")
    return "samples   " + "; ".join(f"{name}: {', '.join(parts)}" for name, parts in found.items())


def _count(loader: Any) -> str:
    dataset = getattr(loader, "dataset", None)
    return f"{len(dataset):,}" if isinstance(dataset, Sized) else "?"


def _steps(module: BaseTransferModule, trainer: Trainer) -> str:
    """Describes epochs, batches and optimizer steps."""
    loaders = by_domain(trainer.train_dataloader, DataLoader)
    sizes = {name: getattr(loader, "batch_size", None) or "?" for name, loader in loaders.items()}
    end = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else None
    epochs = f"{end} epochs of" if end is not None else "epochs of"
    size, *others = set(sizes.values())
    each = f"{size} samples{' of each domain' if len(loaders) > 1 else ''}"
    if others:
        each = " and ".join(f"{count} samples of {name}" for name, count in sizes.items())
    total = f": {module.total_steps:,.0f} steps" if math.isfinite(module.total_steps) else ""
    return f"training  {epochs} {trainer.num_training_batches} batches, {each}{total}"


def _schedule(trainer: Trainer) -> str:
    """Describes the optimizer and its rates."""
    optimizer = type(trainer.optimizers[0]).__name__
    config = next(iter(trainer.lr_scheduler_configs), None)
    if config is None:
        return f"rates     {optimizer}, constant"
    scheduler = config.scheduler
    if isinstance(scheduler, WarmupCosine) and math.isfinite(scheduler.total_steps):
        warm = math.ceil(scheduler.warmup * scheduler.total_steps)
        return f"rates     {optimizer}, a warm-up of {warm} step{'s' * (warm != 1)}, then a cosine to 0"
    return f"rates     {optimizer}, {type(scheduler).__name__} each {config.interval}"
