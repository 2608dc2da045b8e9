"""What every method is: one weighted term of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from tl_modules.base import DomainView, TransferModule


class Method(nn.Module):
    """One term of the loss, computed from the views of the two domains.

    A subclass writes `forward`; it may build what it needs (a critic, start weights, a teacher) in `attach`. State that
    moves lives in buffers or parameters, so that checkpoints carry it.

    Attributes:
        needs: The domains that must be present in training, of "source" and "target".
        reads_x: Whether it looks at a view's `x`; features are then not cached.

    Args:
        weight: What the term is multiplied by.
    """

    needs: tuple[str, ...] = ()
    reads_x: bool = False

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def attach(self, module: TransferModule) -> None:
        """Called once, when the module has its pretrained weights and its head."""

    def forward(self, module: TransferModule, source: DomainView | None, target: DomainView | None) -> Tensor:
        """The term before its weight, a scalar."""
        raise NotImplementedError
