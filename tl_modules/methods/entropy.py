"""Terms on the target's class probabilities: confident for each sample, and diverse over the batch."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from tl_modules.batch.output import DomainOutput
from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.methods.base import Method
from tl_modules.methods.functional import class_confusion, entropy, mutual_information, nuclear_norm
from tl_modules.methods.schedules import LossWeight

__all__ = ["BNM", "MCC", "EntropyMinimization", "InfoMax"]


class TargetOnly(Method):
    """A term on the target's logits only; a subclass implements `term`."""

    required_domains = ("target",)
    needs_classes = True
    supported_settings: ClassVar[tuple[str, ...]] = ("several sources", "source-free")

    def term(self, logits: Tensor) -> Tensor:
        """Computes the term of logits (B, C), a scalar."""
        raise NotImplementedError

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the term on the target."""
        assert target is not None
        return self.term(target.output)


class EntropyMinimization(TargetOnly):
    """`mean H(p)` (Grandvalet and Bengio, NeurIPS 2004).

    Args:
        weight: The term's weight; 0.01 in Shu et al. (ICLR 2018); 0.1 lets classes collapse.
    """

    supported_settings = ("several sources", "partial", "source-free")

    def __init__(self, weight: LossWeight = 0.01) -> None:
        super().__init__(weight)

    def term(self, logits: Tensor) -> Tensor:
        """Computes the mean entropy."""
        return entropy(logits.softmax(1)).mean()


class InfoMax(TargetOnly):
    """`mean H(p) - H(mean p)`: information maximisation (Krause et al., NeurIPS 2010; SHOT's first term)."""

    def term(self, logits: Tensor) -> Tensor:
        """Computes the negative mutual information."""
        return -mutual_information(logits.softmax(1))


class MCC(TargetOnly):
    """Minimum class confusion (Jin et al., ECCV 2020).

    Args:
        weight: The term's weight.
        temperature: Temperature of the softmax; 2.5 in the paper (2 to 3).
    """

    supported_settings = ("several sources", "partial", "source-free")

    def __init__(self, weight: LossWeight = 1.0, temperature: float = 2.5) -> None:
        super().__init__(weight)
        self.temperature = temperature

    def term(self, logits: Tensor) -> Tensor:
        """Computes the confusion of the batch."""
        return class_confusion(logits, self.temperature)


class BNM(TargetOnly):
    """Batch nuclear-norm maximisation: `-||P||_* / B` (Cui et al., CVPR 2020)."""

    def term(self, logits: Tensor) -> Tensor:
        """Computes the negative nuclear norm."""
        return -nuclear_norm(logits.softmax(1))
