"""Sharpness-aware minimisation.

w -> g(w) -> w + rho g / |g| -> g there -> AdamW's step from w
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from tl_modules.errors import UserError

__all__ = ["SAM"]


class SAM(AdamW):
    """Steps by the gradient at the worst point near the weights: AdamW after min_w max_{|e| <= rho} L(w + e).

    The inner maximum is one step, e = rho g / |g|, with the norm over all parameters that train (Foret et al., ICLR
    2021). Each step runs forward and backward twice, which takes twice as long; the logged terms are the mean of both,
    and BatchNorm's running statistics see both. For `--model.optimizer SAM`, in 32 bits or bf16-mixed.

    Args:
        params: Parameters, or groups of them.
        lr: As in AdamW.
        weight_decay: As in AdamW.
        rho: Distance of the worst point, at least 0; 0 is AdamW.
        **kwargs: As for `torch.optim.AdamW`.

    Raises:
        UserError: `rho` is negative.
    """

    def __init__(
        self, params: Any, lr: float = 3e-3, weight_decay: float = 1e-2, rho: float = 0.05, **kwargs: Any
    ) -> None:
        if rho < 0:
            raise UserError(f"rho: {rho:g} must be at least 0")
        super().__init__(params, lr=lr, weight_decay=weight_decay, **kwargs)
        self.rho = rho

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; `closure` computes the loss and its gradients."""
        if closure is None:
            raise UserError("optimizer: SAM computes gradients twice, so step() needs a closure")
        with torch.enable_grad():
            loss = closure()
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if loss is not None and trained and self.rho:
            before = [p.clone() for p in trained]
            gradients = [p.grad for p in trained if isinstance(p.grad, Tensor)]
            share = self.rho / (torch.nn.utils.get_total_norm(gradients) + 1e-12)
            for p, gradient in zip(trained, gradients, strict=True):
                p.add_(gradient * share)
            with torch.enable_grad():
                closure()
            for p, weights in zip(trained, before, strict=True):
                p.copy_(weights)
        super().step()
        return loss
