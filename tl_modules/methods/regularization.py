"""Regularisers that keep a fine-tuned network near what it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tl_modules.methods.base import Method

if TYPE_CHECKING:
    from tl_modules.base import DomainView, TransferModule


class L2SP(Method):
    """L2-SP: weight decay towards the pretrained weights (Li, Grandvalet and Davoine, ICML 2018).

    `1/2 ||w - w0||^2 + head_weight / 2 ||v||^2` with w the backbone's parameters, w0 their start and v the head's.
    The paper's alpha is `weight`, its beta is `weight * head_weight`.

    Args:
        weight: alpha; the paper searches 0.001 to 1 and mostly takes 0.1 (with SGD).
        head_weight: beta / alpha.
    """

    def __init__(self, weight: float = 0.1, head_weight: float = 0.1) -> None:
        super().__init__(weight)
        self.head_weight = head_weight

    def attach(self, module: TransferModule) -> None:
        """Copies the start weights into buffers, so that a checkpoint carries them."""
        for number, parameter in enumerate(module.backbone.parameters()):
            self.register_buffer(f"start_{number}", parameter.detach().clone())

    def forward(self, module: TransferModule, source: DomainView | None, target: DomainView | None) -> Tensor:
        """Squared distance from the start, a scalar."""
        total = self.head_weight * sum(
            (parameter.square().sum() for parameter in module.head.parameters()), torch.zeros((), device=module.device)
        )
        for number, parameter in enumerate(module.backbone.parameters()):
            if parameter.requires_grad:  # what is closed has not moved
                total = total + (parameter - self.get_buffer(f"start_{number}")).square().sum()
        return total / 2
