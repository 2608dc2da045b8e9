"""Sweeps the learning rate over a copy of the model, and reports the result."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, Trainer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from tl_modules.cache import FeatureCache
from tl_modules.cache.store import Store
from tl_modules.checkpoints.files import write_whole
from tl_modules.evaluation.drawing import save_figure
from tl_modules.finetuning.lr_finder import LearningRateSweep
from tl_modules.finetuning.optimizer import configure
from tl_modules.module import TransferModule
from tl_modules.runs.resume import random_state, restore_random_state


def sweep_rates(module: TransferModule, data: LightningDataModule, trainer: Trainer, sweep: LearningRateSweep) -> bool:
    """Trains a copy of the module, on one device; the module, random states and cached features do not change.

    Args:
        module: The module at the start of a run.
        data: The datamodule with the training batches.
        trainer: The run's Trainer, which does not change either.
        sweep: Records the result.

    Returns:
        Whether the head started in closed form.
    """
    state, trial = random_state(), copy.deepcopy(module)
    trial.at_end, trial.lr_scheduler = True, None
    with tempfile.TemporaryDirectory() as folder:
        caches = [copy.copy(each) for each in trainer.callbacks if isinstance(each, FeatureCache)]  # type: ignore[attr-defined]
        for cache in caches:
            cache.store = Store(Path(folder), cache.store.limit)
        try:
            Trainer(
                accelerator=trainer.strategy.root_device.type,
                devices=1,
                precision=trainer.precision,
                max_steps=sweep.steps,
                limit_train_batches=trainer.limit_train_batches,
                limit_val_batches=0,
                accumulate_grad_batches=trainer.accumulate_grad_batches,
                gradient_clip_val=trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
                callbacks=[sweep, *caches],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            ).fit(trial, datamodule=data)
        finally:
            restore_random_state(state)
    return getattr(trial.head, "closed_form", None) != getattr(module.head, "closed_form", None)


def report(module: TransferModule, sweep: LearningRateSweep, solved: bool, folder: Path, rule: str) -> str:
    """Writes lr_find.png and lr_find.yaml; returns the text of the report."""
    plot, config, rates = folder / "lr_find.png", folder / "lr_find.yaml", sweep.suggestions()
    save_figure(sweep.figure(), plot)
    ended = f"\nended early: {sweep.ended}" if sweep.ended else ""
    if not rates:
        config.unlink(missing_ok=True)  # from an earlier sweep
        start = ", since the head starts in closed form" if solved else ""
        return (
            f"learning rate: the loss falls at no rate from {sweep.min_lr:.2g} to {sweep.max_lr:.2g}{start}; keep "
            f"your current rate{ended}\nplot: {plot}"
        )
    rate = float(f"{rates[rule]:.2g}")
    others = ", ".join(f"{name} {other:.2g}" for name, other in rates.items() if name != rule)
    line = yaml.safe_dump({"model": {"init_args": _config(module, rate)}}, default_flow_style=True, width=200).strip()
    write_whole(config, line + "\n")
    return (
        f"learning rate: {rate:.2g} by {rule} ({others})\n{line}\n"
        f"to use it, add -c {config} at the end of the command{ended}\nplot: {plot}"
    )


def _config(module: TransferModule, rate: float) -> dict[str, Any]:
    """Returns the model's arguments with that rate; for a cyclic scheduler it is the scheduler's."""
    built: Any = configure(module)
    scheduler = built["lr_scheduler"]["scheduler"] if isinstance(built, dict) else None
    owner, name = ("lr_scheduler", "max_lr") if isinstance(scheduler, OneCycleLR | CyclicLR) else ("optimizer", "lr")
    return {owner: {"init_args": {name: rate}}}
