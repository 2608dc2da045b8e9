"""Defaults of a run's optimisation that its config leaves open, and how learning rates are resumed.

part                         learning rate                       changed by
head, methods                3e-3 (AdamW)                        --model.optimizer.lr
stages, pretrained           1/30 of that; 1/10 if little trains --model.finetuning.backbone_lr
stages, random               as the head                         --model.finetuning.backbone_lr
a stage below another one    x lr_decay                          --model.finetuning.lr_decay
each step                    warm-up 5 %, then a cosine to 0     --model.lr_scheduler, null: constant
rows to classes, random      1e-2 (SGD, Nesterov momentum 0.9)   --model.optimizer

part                         weight decay                        changed by
weights                      0.01 (AdamW), 1e-3 (SGD)            --model.optimizer.weight_decay
biases, norms, embeddings    0, in groups `.../no_decay`         nothing

data                         epochs                              changed by
fine-tuning                  10, or more up to 10,000 samples    --trainer.max_epochs
beside a source              10, or more up to 30,000 samples    --trainer.max_epochs

Gradients are not clipped (--trainer.gradient_clip_val). 3e-3 and 0.01 are in `TransferModule.__init__`, 1/30 and 1/10
in finetuning/base.py and freezing.py; the optimizer for rows and the epochs are decided here, and only used by `tl`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from tl_modules.batch.compat import SCHEDULER_STATE, set_rates, skip_graph_check
from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.errors import UserError

__all__ = ["WarmupCosine"]

NO_DECAY = "/no_decay"
# for networks on rows of numbers, as Long et al. (JMLR 2018 and before) train a bottleneck on features
ROWS = {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}
EPOCHS, SAMPLES, SAMPLES_BESIDE_A_SOURCE = 10, 10_000, 30_000
RATES = ("lr", "initial_lr", "max_lr", "min_lr", "configured_lr")


class WarmupCosine(LRScheduler):
    """Raises the learning rate linearly, then lowers it to 0 along a cosine; stepped each step.

    Args:
        optimizer: The optimizer.
        warmup: Share of the steps in which the rate grows.
        total_steps: Number of steps; None takes the run's. If a run has no end, the rate is constant.

    Raises:
        UserError: `warmup` is not in [0, 1).
    """

    def __init__(self, optimizer: Optimizer, warmup: float = 0.05, total_steps: int | None = None) -> None:
        if not 0 <= warmup < 1:
            raise UserError(f"warmup: {warmup} must be in [0, 1)")
        self.warmup = warmup
        self.total_steps = math.inf if total_steps is None else total_steps
        self.of_run = total_steps is None
        super().__init__(optimizer)

    def bind(self, steps: float) -> None:
        """Sets the length of the run, unless one was given; called when training starts.

        Not earlier: computing it in Lightning (2.6) before the loaders of a resumed run are restored loses their
        position.
        """
        if self.of_run:
            self.total_steps = steps
            set_rates(self, self.get_lr())

    def factor(self, step: int) -> float:
        """Returns the share of the full rate in a step, counted from 0."""
        if math.isinf(self.total_steps):
            return 1.0
        warm = self.warmup * self.total_steps
        if step < warm:
            return (step + 1) / (warm + 1)
        return (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1.0, self.total_steps - warm)))) / 2

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Returns the current rate of each group."""
        return [float(lr) * self.factor(self.last_epoch) for lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Returns the step only; the shape of the schedule follows from the run's current config."""
        return {key: getattr(self, key) for key in SCHEDULER_STATE}


def configure(module: BaseTransferModule) -> Any:
    """Returns what Lightning's `configure_optimizers` expects: named groups with scaled rates, and a scheduler."""
    optimizer = module.optimizer(list(module.finetuning.param_groups(module)))
    _exempt_from_decay(optimizer, module)
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]
        group["configured_lr"] = group["lr"]
    enable_fused(optimizer)
    if module.lr_scheduler is None:
        return optimizer
    scheduler = module.lr_scheduler(optimizer)
    each_step = isinstance(scheduler, OneCycleLR | CyclicLR | WarmupCosine)
    if isinstance(scheduler, OneCycleLR | CyclicLR):
        _scale_cycle(optimizer, scheduler)
    config: dict[str, Any] = {"scheduler": scheduler, "interval": "step" if each_step else "epoch"}
    if isinstance(scheduler, ReduceLROnPlateau):
        # without a name it monitors the loss, or the task's metric if higher is better
        watched = "val/loss" if scheduler.mode == "min" else module.monitor[0]
        config["monitor"] = getattr(scheduler, "monitor", watched)
    return {"optimizer": optimizer, "lr_scheduler": config}


def default_epochs(samples: Sequence[int]) -> int:
    """Returns the default number of epochs: ten, and more if there are few data.

    Args:
        samples: Number of training samples of each domain; empty if unknown.
    """
    budget = SAMPLES if len(samples) < 2 else SAMPLES_BESIDE_A_SOURCE
    return max(EPOCHS, math.ceil(budget / max(1, *samples))) if samples else EPOCHS


def _exempt_from_decay(optimizer: Optimizer, module: nn.Module) -> None:
    """Moves parameters that should not decay into their own groups: scales, biases, embeddings, tokens (1, N, D)."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    for group in list(optimizer.param_groups):
        exempt = [p for p in group["params"] if p.ndim < 2 or id(p) in embeddings or (p.ndim == 3 and len(p) == 1)]
        if not group.get("weight_decay") or not exempt:
            continue
        if len(exempt) == len(group["params"]):
            group["weight_decay"] = 0.0
            continue
        chosen = {id(p) for p in exempt}
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
        optimizer.add_param_group(
            {**group, "params": exempt, "weight_decay": 0.0, "name": f"{group['name']}{NO_DECAY}"}
        )


def enable_fused(optimizer: Optimizer) -> Optimizer:
    """Enables the fused kernel of an optimizer that has one, unless another implementation was requested."""
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    given = optimizer.defaults
    asked = given.get("foreach") is not None or given.get("capturable") or given.get("differentiable")
    if given.get("fused", False) is None and not asked and all(p.is_floating_point() for p in everything):
        for group in optimizer.param_groups:
            group["fused"] = True
    if all(p.device.type == "cpu" for p in everything):
        skip_graph_check(optimizer)
    return optimizer


def _scale_cycle(optimizer: Optimizer, scheduler: Any) -> None:
    """Scales a cycle's learning rates in each group, because these schedulers set one value for all."""
    for number, group in enumerate(optimizer.param_groups):
        for key in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():
            group[key] *= group["lr_scale"]
        for rates in (scheduler.base_lrs, getattr(scheduler, "max_lrs", None)):
            if rates is not None:
                rates[number] *= group["lr_scale"]


def resume_rates(module: BaseTransferModule, checkpoint: dict[str, Any]) -> None:
    """Applies learning rates that have changed since a checkpoint, each at the schedule's current fraction of it.

    Args:
        module: The module as configured now.
        checkpoint: The checkpoint of an interrupted run; its optimizer and scheduler states are modified in place.

    Raises:
        UserError: Its parameter groups differ from this module's, or it was made with another optimizer.
    """
    states, schedulers = checkpoint["optimizer_states"], checkpoint.get("lr_schedulers", [])
    built = configure(module)  # the Trainer builds its own only after it has read the checkpoint
    optimizer = built["optimizer"] if isinstance(built, dict) else built
    _divide_groups(states[0], module, optimizer)
    before, now = states[0]["param_groups"], optimizer.param_groups
    names = [[(g.get("name"), len(g["params"])) for g in groups] for groups in (before, now)]
    if names[0] != names[1]:
        raise UserError(
            f"checkpoint: its optimizer has {_groups(names[0])}, this model's has {_groups(names[1])}; continue with "
            "the same backbone, head and methods, or start a new run with --model.backbone.weights"
        )
    others, own = (set(groups[0]) - set(RATES) for groups in (before, now))
    if others - own and own - others:  # a single additional key means another version of torch
        raise UserError(
            f"optimizer: the checkpoint was made with another one, which has {', '.join(sorted(others - own))}; "
            f"{type(optimizer).__name__} has {', '.join(sorted(own - others))}; use the run's own, or start a "
            "new run from its weights, --model.backbone.weights RUN"
        )
    given = [{key: group[key] for key in RATES if key in group} for group in now]
    cyclic = isinstance(built, dict) and isinstance(built["lr_scheduler"]["scheduler"], OneCycleLR | CyclicLR)
    for old, new in zip(before, given, strict=True):
        configured = old.get("configured_lr", new["configured_lr"])
        for key in old.keys() & set(RATES):
            reset = not configured or (cyclic and key in ("initial_lr", "max_lr", "min_lr"))  # there is no share of 0
            old[key] = new[key] if reset else old[key] * (new["configured_lr"] / configured)
    for state in schedulers:
        if "base_lrs" in state:
            state["base_lrs"] = [group.get("initial_lr", group["lr"]) for group in before]
        if "max_lrs" in state:
            state["max_lrs"] = list(built["lr_scheduler"]["scheduler"].max_lrs)
    if cyclic and schedulers:  # their rate follows from the step alone
        scheduler: Any = built["lr_scheduler"]["scheduler"]
        scheduler.last_epoch = schedulers[0]["last_epoch"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a call without an optimizer step
            rates = scheduler.get_lr()
        for old, lr in zip(before, rates, strict=True):
            old["lr"] = lr


def _divide_groups(state: dict[str, Any], module: BaseTransferModule, optimizer: Optimizer) -> None:
    """Adapts the state of a run from before there were groups without decay to the current groups, in place."""
    old = {group.get("name"): group for group in state["param_groups"]}
    parameters = [p for group in module.finetuning.param_groups(module) for p in group["params"]]
    if any(str(name).endswith(NO_DECAY) for name in old) or len(parameters) != sum(
        len(g["params"]) for g in old.values()
    ):
        return
    number = {id(p): i for i, p in enumerate(parameters)}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        was = old.get(group["name"].removesuffix(NO_DECAY))
        if was is None:
            return
        groups.append({**was, "name": group["name"], "weight_decay": group["weight_decay"]})
        groups[-1]["params"] = [number[id(p)] for p in group["params"]]
    state["param_groups"] = groups


def _groups(groups: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({count} tensors)" for name, count in groups)
