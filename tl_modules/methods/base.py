"""What every method is: one weighted term of the loss."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from tl_modules.errors import UserError
from tl_modules.schedules import Weight

if TYPE_CHECKING:
    from tl_modules.base import TransferModule
    from tl_modules.views import DomainView


class Method(nn.Module):
    """One term of the loss, computed from the views of the source (several sources in one view) and of the target.

    A subclass writes `forward`; it may build what it needs (a critic, start weights, a teacher) in `attach`. State that
    moves lives in buffers or parameters, so that checkpoints carry it.

    Attributes:
        needs: The domains that must be present in training, of "source", "target", "domains" (any two) and "sources"
            (at least two of them).
        needs_classes: Whether it works on class probabilities, that is, only in classification.
        reads_x: Whether it looks at a view's `x`; features are then not cached.
        changes_backbone: Whether `attach` changes the backbone; it then comes before that of the others.
        settings: In which settings beside one labelled source and one target with the same classes it is sound:
            "several sources", "generalisation" (no target in training), "partial" (the target lacks classes), "open
            set" (the target has classes of its own), "source-free".

    Args:
        weight: What the term is multiplied by, a number or a `Schedule`.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    needs_classes: ClassVar[bool] = False
    reads_x: ClassVar[bool] = False
    changes_backbone: ClassVar[bool] = False
    settings: ClassVar[tuple[str, ...]] = ("several sources",)

    def __init__(self, weight: Weight = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def attach(self, module: TransferModule) -> None:
        """Called once, when the module has its pretrained weights and its head."""

    def forward(self, module: TransferModule, source: DomainView | None, target: DomainView | None) -> Tensor:
        """The term before its weight, a scalar."""
        raise NotImplementedError

    def check(self, module: TransferModule, domains: list[str]) -> None:
        """Refuses training data that lack what it needs; called when training starts.

        Raises:
            UserError: A domain is missing.
        """
        sources = [name for name in domains if name != "target"]
        missing = {
            "source": not sources and "a source domain in training; give --data.source",
            "target": "target" not in domains and "a target domain in training; give --data.target",
            "domains": len(domains) < 2 and "two domains in training, a source and a target or two sources",
            "sources": len(sources) < 2 and "at least two source domains in training",
        }
        for need in self.needs:
            if missing[need]:
                what, _, advice = str(missing[need]).partition("; ")
                raise UserError(
                    f"methods: {type(self).__name__} needs {what}, but the data has only "
                    f"{' and '.join(domains)}{advice and f'; {advice}'}"
                )


def pairs(source: DomainView | None, target: DomainView | None) -> list[tuple[DomainView, DomainView]]:
    """The pairs of domains to bring together: source and target, or without a target each two of the sources."""
    assert source is not None
    return [(source, target)] if target is not None else list(combinations(source.split(), 2))
