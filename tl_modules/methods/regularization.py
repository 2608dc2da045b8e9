"""Regularisers of fine-tuning: near what the network was, and away from what does not transfer.

They need the pretrained weights or their head, and no source data.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tl_modules.batch.output import DomainOutput
from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.errors import UserError
from tl_modules.heads import Bottleneck
from tl_modules.methods.base import Method
from tl_modules.methods.functional import soft_cross_entropy
from tl_modules.methods.schedules import LossWeight

__all__ = ["BSS", "DELTA", "L2SP", "CoTuning", "LwF"]


class L2SP(Method):
    """L2-SP: weight decay towards the pretrained weights (Li, Grandvalet and Davoine, ICML 2018).

    `1/2 ||w - w0||^2 + head_weight / 2 ||v||^2` with w the backbone's parameters, w0 their start and v the head's.
    The paper's alpha is `weight`, its beta is `weight * head_weight`.

    Args:
        weight: alpha; the paper searches 0.001 to 1 and mostly takes 0.1 (with SGD).
        head_weight: beta / alpha.
    """

    supported_settings = ("several sources", "generalisation", "partial", "open set", "source-free")

    def __init__(self, weight: LossWeight = 0.1, head_weight: float = 0.1) -> None:
        super().__init__(weight)
        self.head_weight = head_weight

    def attach(self, module: BaseTransferModule) -> None:
        """Copies the start weights into buffers, so that a checkpoint carries them."""
        for number, parameter in enumerate(module.backbone.parameters()):
            self.register_buffer(f"start_{number}", parameter.detach().clone())

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Squared distance from the start, a scalar."""
        total = self.head_weight * sum(
            (parameter.square().sum() for parameter in module.head.parameters()), torch.zeros((), device=module.device)
        )
        for number, parameter in enumerate(module.backbone.parameters()):
            if parameter.requires_grad:  # what is closed has not moved
                total = total + (parameter - self.get_buffer(f"start_{number}")).square().sum()
        return total / 2


class BSS(Method):
    """Batch spectral shrinkage: `sum of the k smallest sigma^2` of the batch's features (Chen et al., NeurIPS 2019).

    Args:
        weight: eta; the paper takes 0.001.
        k: How many singular values; the paper takes 1.
    """

    supported_settings = ("several sources", "generalisation", "partial", "open set", "source-free")

    def __init__(self, weight: LossWeight = 1e-3, k: int = 1) -> None:
        super().__init__(weight)
        self.k = k

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Of all rows of the step."""
        features = torch.cat([view.pooled for view in (source, target) if view is not None])
        smallest: Tensor = torch.linalg.svdvals(features)[-self.k :]
        return smallest.square().sum()


class WithPretrainedCopy(Method):
    """A method that keeps the network as it was, its pretrained start, in eval mode."""

    needs_raw_input = True

    def attach(self, module: BaseTransferModule) -> None:
        """Copies the backbone."""
        self.start = copy.deepcopy(module.backbone).requires_grad_(False).eval()

    def before(self, x: Any) -> Tensor:
        """The vectors (B, D) that the network gave of inputs at its start."""
        return self.start.pooled_features(self.start(x))

    def train(self, mode: bool = True) -> WithPretrainedCopy:
        """The start stays as it was."""
        super().train(mode)
        if hasattr(self, "start"):
            self.start.eval()
        return self


class DELTA(WithPretrainedCopy):
    """Behaviour as it was: `1/2 sum_l mean ||F_l(x) - F_l^0(x)||^2` of the stages' outputs (Li et al., ICLR 2019).

    A stage's distance is a mean over its values, and all channels count the same: the paper's attention, which weighs
    a channel by what the loss would be without it, takes a pass over the data for each of them and is left out.

    Args:
        weight: Of the term.
    """

    supported_settings = ("several sources", "generalisation", "partial", "open set", "source-free")

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """The mean over the stages, on the domain that the model is for."""
        view = target or source
        assert view is not None
        with torch.no_grad():
            run = self.before if module.uses_pooled_features else self.start  # a learnt pooling is in the last stage
            before = stage_outputs(self.start, run, view.x)
        now = stage_outputs(module.backbone, lambda x: module.forward_extra(x), view.x)
        return torch.stack([F.mse_loss(a, b) for a, b in zip(now, before, strict=True)]).sum() / 2


def stage_outputs(backbone: Any, run: Any, x: Any) -> list[Tensor]:
    """What leaves each stage while `run(x)` passes through the backbone."""
    outputs: list[Tensor] = []
    last = [stage[-1] if isinstance(stage, nn.ModuleList) else stage for stage in backbone.stages()]
    hooks = [module.register_forward_hook(lambda m, i, output: outputs.append(output)) for module in last]
    try:
        run(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [output for output in outputs if isinstance(output, Tensor)]


PARTS = ("weight", "bias")


class SourceHead(nn.Module):
    """The pretrained head, a linear layer on the features as they are, or on normalised ones as in `LinearHead`."""

    normalized: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(in_features), nn.Linear(in_features, out_features)
        self.register_buffer("normalized", torch.tensor(False))

    def take(self, head: Mapping[str, Tensor]) -> bool:
        """Takes the weights of a pretrained head; whether it is one of these."""
        own = dict(self.named_parameters())
        # where the keys of each kind begin here, and there
        for normalized, layout in ((False, {"linear.": ""}), (True, {"norm.": "0.", "linear.": "1."})):
            given = {f"{at}{part}": head.get(f"{there}{part}") for at, there in layout.items() for part in PARTS}
            if len(given) == len(head) and all(v is not None and v.shape == own[k].shape for k, v in given.items()):
                self.load_state_dict(given, strict=False)
                self.normalized.fill_(normalized)
                return True
        return False

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_features) -> (B, out_features)."""
        return cast(Tensor, self.linear(torch.where(self.normalized, self.norm(features), features)))


class WithPretrainedHead(WithPretrainedCopy):
    """A method that needs the pretrained head too: of a run of ours, or of a classifier whose last layer is linear.

    Args:
        weight: Of the term.
        source_classes: How many classes the pretrained head knows, e.g. 1000 for ImageNet.
    """

    needs_classes = True

    def __init__(self, source_classes: int, weight: LossWeight = 1.0) -> None:
        super().__init__(weight)
        self.source_classes = source_classes

    def attach(self, module: BaseTransferModule) -> None:
        """Takes the head twice: one that stays, and one that is trained along."""
        super().attach(module)
        if isinstance(module.bottleneck, Bottleneck):
            raise UserError(f"bottleneck: the pretrained head of {type(self).__name__} lacks it; leave it out")
        self.old = SourceHead(module.backbone.width, self.source_classes)
        pretrained = module.backbone.pretrained
        self.given = {} if pretrained is None else {k: tuple(v.shape) for k, v in pretrained.head.items()}
        self.found = pretrained is not None and self.old.take(pretrained.head)
        self.head = copy.deepcopy(self.old)
        self.old.requires_grad_(False)

    def check(self, module: BaseTransferModule, domains: list[str]) -> None:
        """Also refuses to start without the head.

        Raises:
            UserError: The pretrained weights bring no linear head of so many classes.
        """
        super().check(module, domains)
        if not self.found and module.trainer.ckpt_path is None:
            have = (
                f"bring one of {', '.join(f'{k} {v}' for k, v in self.given.items())}" if self.given else "bring none"
            )
            raise UserError(
                f"methods: {type(self).__name__} needs the pretrained linear head of {self.source_classes} classes "
                f"(source_classes), and the weights {have}; give a run, or a classifier that ends in a linear layer, "
                "by --model.backbone.weights"
            )


class LwF(WithPretrainedHead):
    """Learning without forgetting: the old head keeps its answers on the new data (Li and Hoiem, ECCV 2016).

    `mean CE(softmax(old output of the start / T), softmax(old output now / T))`.

    Args:
        source_classes: How many classes the pretrained head knows.
        weight: lambda_o; the paper takes 1.
        temperature: T; the paper takes 2.
    """

    supported_settings = ("several sources", "generalisation", "source-free")

    def __init__(self, source_classes: int, weight: LossWeight = 1.0, temperature: float = 2.0) -> None:
        super().__init__(source_classes, weight)
        self.temperature = temperature

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Of the domain that the model is for."""
        view = target or source
        assert view is not None
        with torch.no_grad():
            taught = (self.old(self.before(view.x)) / self.temperature).softmax(1)
        return soft_cross_entropy(self.head(view.pooled) / self.temperature, taught).mean()


class CoTuning(WithPretrainedHead):
    """Fine-tunes the pretrained head too, on source labels that go with the target's (You et al., NeurIPS 2020).

    `mean CE(head_S(f(x)), p(y_S | y))` with the relation p(y_S | y) the mean of the start's source probabilities over
    the samples of class y (the paper's direct approach), as a running mean in place of a pass before training.

    Args:
        source_classes: How many classes the pretrained head knows.
        weight: lambda; the paper takes 2.3.
    """

    supported_settings = ("several sources", "generalisation")

    def __init__(self, source_classes: int, weight: LossWeight = 2.3) -> None:
        super().__init__(source_classes, weight)

    def attach(self, module: BaseTransferModule) -> None:
        """The relation begins as equal shares."""
        super().attach(module)
        shape = (module.num_outputs, self.source_classes)
        self.register_buffer("relation", torch.full(shape, 1e-3 / self.source_classes))

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Of the labelled samples of the domain that the model is for, or else of the source's."""
        known = (view.with_labels for view in (target, source) if view is not None)
        view = next((view for view in known if view is not None), None)
        if view is None:
            raise UserError("methods: CoTuning needs labelled samples, which the training data does not have")
        relation = self.get_buffer("relation")
        if self.training:
            with torch.no_grad():
                relation += self.shares(view.y).T @ self.old(self.before(view.x)).softmax(1)
        share = relation / relation.sum(1, keepdim=True)
        return soft_cross_entropy(self.head(view.pooled), self.shares(view.y) @ share).mean()

    def shares(self, y: Tensor) -> Tensor:
        """Class numbers (B,), or shares of the classes (B, C) -> shares."""
        return y if y.is_floating_point() else F.one_hot(y, len(self.get_buffer("relation"))).float()
