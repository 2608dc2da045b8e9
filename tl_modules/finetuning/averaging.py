"""Keeps averages of the weights exact where nothing trains.

Lightning's averaging callbacks average everything, and `decay * w + (1 - decay) * w` is not w in floating point: what
is frozen would move by a last digit in each step, and with it whatever starts from that checkpoint. (torch 2.15's
`get_ema_avg_fn`; `tests/finetuning/test_averaging.py` tells when it is exact.)
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
    """The networks that the run's averaging callbacks keep."""
    callbacks = cast(Any, module.trainer).callbacks if attached(module) else []
    found = [average_of(callback) for callback in callbacks if isinstance(callback, WeightAveraging)]
    return [average.module for average in found if average is not None]


def keep_exact(module: BaseTransferModule) -> None:
    """Lets the run's averaging callbacks average what trains alone; called when a fit starts.

    Raises:
        UserError: A callback cannot be kept from moving what is closed.
    """
    for callback in cast(Any, module.trainer).callbacks:
        opens_all = len(module.finetuning.open_stages(module, 0)) == module.num_stages
        if isinstance(callback, StochasticWeightAveraging) and not opens_all:
            raise UserError(
                "callbacks: StochasticWeightAveraging takes BatchNorm's statistics anew, those of closed stages too; "
                "take EMAWeightAveraging, or Full"
            )
        if isinstance(callback, WeightAveraging) and (average := average_of(callback)) is not None:
            average.update_parameters = _Update(average)


class _Update:
    """Updates an average, and then takes over what rests as it is.

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
            self.trainable, self.pairs = module.trainable, [(mine[name], tensor) for name, tensor in _resting(module)]
        for average, current in self.pairs:
            if average.shape != current.shape:  # a buffer that has got its size since
                average.resize_(current.shape)
        self.update(module)
        for average, current in self.pairs:
            average.copy_(current)


def _resting(module: BaseTransferModule) -> list[tuple[str, Tensor]]:
    """What no optimizer moves now: what is closed, and the methods' buffers and parameters without gradient."""
    methods = [(n, p) for n, p in module.named_parameters() if n.startswith("methods.") and not p.requires_grad]
    buffers = [(n, b) for n, b in module.named_buffers() if n.startswith("methods.")]
    return (
        methods
        + buffers
        + [pair for named in module.finetuning.frozen_tensors(module).values() for pair in named.items()]
    )
