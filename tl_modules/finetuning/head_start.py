"""Initialises the head: from the training labels, and a linear one in closed form on a frozen pretrained backbone.

labels of the training data -> `Task.see_labels`, e.g. their mean and deviation

The closed form uses the backbone's features of the training data. It is not used if the backbone will train too: a head
that already fits the training data leaves little gradient to learn from, and in trials with MobileNetV1 fine-tuning
from it ended 2 to 7 points lower (clothes, emoji, magnetic tiles).

training data, not augmented -> backbone in eval mode -> features -> the task's closed form -> the head's last layer
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tl_modules.batch.full_pass import outputs_of
from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.batch.ranks import every_rank
from tl_modules.batch.task import Task
from tl_modules.heads import Bottleneck, LinearHead

log = logging.getLogger(__name__)
MANY = 10_000  # samples; more would hardly change the result


def start_head(module: BaseTransferModule, loaders: Mapping[str, Any]) -> None:
    """Passes the labels to the task, and initialises a head without weights in closed form; any other head is kept.

    Args:
        module: The module on its device, in a fit that starts.
        loaders: The training loaders, by domain.
    """
    trainer, head = module.trainer, module.head
    if trainer.ckpt_path is None and (labels := _visible_labels(loaders)):
        module.see_labels(np.concatenate(labels))
    if not isinstance(head, LinearHead) or not head.closed_form or isinstance(module.bottleneck, Bottleneck):
        return
    if type(module).closed_form is Task.closed_form or not module.uses_pooled_features:
        return
    if module.trainable_stages() or module.backbone.random or trainer.ckpt_path is not None:
        return
    normalise, last = head[0], cast(nn.Linear, head[1])
    found: list[tuple[Tensor, Tensor]] = []
    for domain, loader in loaders.items():
        if getattr(loader.dataset, "label", "y") == "none":
            continue
        rows: Sequence[int]
        if hasattr(loader, "plain"):
            order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(0))[:MANY].sort().values
            rows = order[trainer.global_rank :: trainer.world_size].tolist()
        else:
            rows = range(-(-MANY // trainer.world_size))
        for output in outputs_of(module, domain, loader, rows):
            if output.y is None:
                break
            found.append((normalise(output.pooled.float()).detach().cpu(), output.y.cpu()))
    everything = [pair for part in every_rank(trainer, found) for pair in part]
    features, labels = ([pair[i] for pair in everything] for i in range(2))
    solved = module.closed_form(torch.cat(features), torch.cat(labels)) if features else None
    solved = trainer.strategy.broadcast(solved)  # its last digits can differ between machines
    if solved is None:
        return
    with torch.no_grad():
        for parameter, value in zip((last.weight, last.bias), solved, strict=True):
            parameter.copy_(value)
    head.closed_form = False
    if trainer.is_global_zero:
        log.info("head: starts in closed form, from the features of %s samples", f"{sum(map(len, features)):,}")


def _visible_labels(loaders: Mapping[str, Any]) -> list[Any]:
    """Returns the labels of the training rows of each domain whose data set has `targets` in memory, as numbers."""
    views = [loader.dataset for loader in loaders.values() if getattr(loader.dataset, "label", "") == "y"]
    found = [(np.asarray(getattr(view.dataset, "targets", None)), np.asarray(view.rows)) for view in views]
    return [targets[rows] for targets, rows in found if targets.ndim and targets.dtype.kind in "fiu"]
