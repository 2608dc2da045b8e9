"""Keeps averages of frozen weights exact.

Lightning's averaging callbacks average all weights, and `decay * w + (1 - decay) * w` is not exactly w in floating
point: frozen weights would drift in the last digit with each step, and so would everything that starts from that
checkpoint. (torch 2.15's `get_ema_avg_fn`; `tests/finetuning/test_averaging.py` shows when it becomes exact.)
"""

from __future__ import annotations

from itertools import chain
from typing import Any, cast

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from tl_modules.batch.compat import attached, average_of
from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.errors import UserError


def averages(module: BaseTransferModule) -> list[nn.Module]:
    """Returns the averaged networks that the run's callbacks keep."""
    callbacks = cast(Any, module.trainer).callbacks if attached(module) else []
    found = [average_of(callback) for callback in callbacks if isinstance(callback, WeightAveraging)]
    return [average.module for average in found if average is not None]


def keep_exact(module: BaseTransferModule) -> None:
    """Makes the run's averaging callbacks average only what trains; called when a fit starts.

    Raises:
        UserError: A callback would change frozen tensors in a way that cannot be prevented.
    """
    for callback in cast(Any, module.trainer).callbacks:
        opens_all = len(module.finetuning.open_stages(module, 0)) == module.num_stages
        if isinstance(callback, StochasticWeightAveraging) and not opens_all:
            raise UserError(
                "callbacks: StochasticWeightAveraging recomputes BatchNorm's statistics, even in frozen stages; "
                "use EMAWeightAveraging, or FullFineTuning"
            )
        if isinstance(callback, WeightAveraging) and (average := average_of(callback)) is not None:
            average.update_parameters = _Update(average)


class _Update:
    """Updates an average, then copies frozen tensors unchanged.

    Args:
        average: torch's AveragedModel.
    """

    def __init__(self, average: Any) -> None:
        self.average, self.update = average, average.update_parameters
        self.trainable: range | None = None
        self.pairs: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def __call__(self, module: BaseTransferModule) -> None:
        if self.trainable != module.trainable:
            mine = dict(chain(self.average.module.named_parameters(), self.average.module.named_buffers()))
            self.trainable = module.trainable
            self.pairs = [(mine[name], tensor) for name, tensor in _frozen(module)]
        for average, current in self.pairs:
            if average.shape != current.shape:  # a buffer that was resized since
                average.resize_(current.shape)
        self.update(module)
        for average, current in self.pairs:
            average.copy_(current)


def _frozen(module: BaseTransferModule) -> list[tuple[str, Tensor]]:
    """Lists tensors that no optimizer updates now: frozen ones, the methods' buffers and their frozen parameters."""
    methods = [(n, p) for n, p in module.named_parameters() if n.startswith("methods.") and not p.requires_grad]
    buffers = [(n, b) for n, b in module.named_buffers() if n.startswith("methods.")]
    return (
        methods
        + buffers
        + [pair for named in module.finetuning.frozen_tensors(module).values() for pair in named.items()]
    )
