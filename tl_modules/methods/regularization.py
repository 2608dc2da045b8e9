"""Regularisers for fine-tuning: keep the network close to its pretrained state, or suppress what does not transfer.

They need the pretrained weights or their head, but no source data.
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
        weight: alpha; searched from 0.001 to 1 in the paper, mostly 0.1 (with SGD).
        head_weight: beta / alpha.
    """

    supported_settings = ("several sources", "generalisation", "partial", "open set", "source-free")

    def __init__(self, weight: LossWeight = 0.1, head_weight: float = 0.1) -> None:
        super().__init__(weight)
        self.head_weight = head_weight

    def attach(self, module: BaseTransferModule) -> None:
        """Copies the initial weights into buffers, so that checkpoints save them."""
        for number, parameter in enumerate(module.backbone.parameters()):
            self.register_buffer(f"start_{number}", parameter.detach().clone())

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the squared distance from the start, a scalar."""
        total = self.head_weight * sum(
            (parameter.square().sum() for parameter in module.head.parameters()), torch.zeros((), device=module.device)
        )
        for number, parameter in enumerate(module.backbone.parameters()):
            if parameter.requires_grad:  # frozen parameters have not changed
                total = total + (parameter - self.get_buffer(f"start_{number}")).square().sum()
        return total / 2


class BSS(Method):
    """Batch spectral shrinkage: sum of the k smallest sigma^2 of the batch's features (Chen et al., NeurIPS 2019).

    Args:
        weight: eta; 0.001 in the paper.
        k: Number of singular values; 1 in the paper.
    """

    supported_settings = ("several sources", "generalisation", "partial", "open set", "source-free")

    def __init__(self, weight: LossWeight = 1e-3, k: int = 1) -> None:
        super().__init__(weight)
        self.k = k

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the term over all samples of the step."""
        features = torch.cat([view.pooled for view in (source, target) if view is not None])
        smallest: Tensor = torch.linalg.svdvals(features)[-self.k :]
        return smallest.square().sum()


class WithPretrainedCopy(Method):
    """A method with a copy of the pretrained network, in eval mode."""

    needs_raw_input = True

    def attach(self, module: BaseTransferModule) -> None:
        """Copies the backbone."""
        self.start = copy.deepcopy(module.backbone).requires_grad_(False).eval()

    def before(self, x: Any) -> Tensor:
        """Computes the pretrained network's features (B, D) of inputs."""
        return self.start.pooled_features(self.start(x))

    def train(self, mode: bool = True) -> WithPretrainedCopy:
        """Sets the mode, but keeps the copy in eval mode."""
        super().train(mode)
        if hasattr(self, "start"):
            self.start.eval()
        return self


class DELTA(WithPretrainedCopy):
    """Preserves behaviour: `1/2 sum_l mean ||F_l(x) - F_l^0(x)||^2` of the stages' outputs (Li et al., ICLR 2019).

    A stage's distance is a mean over its values, with equal weights of the channels: the paper's attention weights a
    channel by the loss without it, which takes a pass over the data for each channel, and is left out.

    Args:
        weight: The term's weight.
    """

    supported_settings = ("several sources", "generalisation", "partial", "open set", "source-free")

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the mean over the stages, on the target, or else the source."""
        view = target or source
        assert view is not None
        with torch.no_grad():
            run = self.before if module.uses_pooled_features else self.start  # a learnt pooling is in the last stage
            before = stage_outputs(self.start, run, view.x)
        now = stage_outputs(module.backbone, lambda x: module.forward_extra(x), view.x)
        return torch.stack([F.mse_loss(a, b) for a, b in zip(now, before, strict=True)]).sum() / 2


def stage_outputs(backbone: Any, run: Any, x: Any) -> list[Tensor]:
    """Returns the output of each stage while `run(x)` passes through the backbone."""
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
    """The pretrained head: a linear layer on raw features, or on normalised ones as in `LinearHead`."""

    normalized: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(in_features), nn.Linear(in_features, out_features)
        self.register_buffer("normalized", torch.tensor(False))

    def take(self, head: Mapping[str, Tensor]) -> bool:
        """Loads the weights of a pretrained head; returns whether it is of a supported kind."""
        own = dict(self.named_parameters())
        # prefixes of each kind of head: here, and in the file
        for normalized, layout in ((False, {"linear.": ""}), (True, {"norm.": "0.", "linear.": "1."})):
            given = {f"{at}{part}": head.get(f"{there}{part}") for at, there in layout.items() for part in PARTS}
            if len(given) == len(head) and all(v is not None and v.shape == own[k].shape for k, v in given.items()):
                self.load_state_dict(given, strict=False)
                self.normalized.fill_(normalized)
                return True
        return False

    def forward(self, features: Tensor) -> Tensor:
        """Maps (B, in_features) to (B, out_features)."""
        return cast(Tensor, self.linear(torch.where(self.normalized, self.norm(features), features)))


class WithPretrainedHead(WithPretrainedCopy):
    """A method that also needs the pretrained head: of a run, or of a classifier whose last layer is linear.

    Args:
        weight: The term's weight.
        source_classes: Number of classes of the pretrained head, e.g. 1000 for ImageNet.
    """

    needs_classes = True

    def __init__(self, source_classes: int, weight: LossWeight = 1.0) -> None:
        super().__init__(weight)
        self.source_classes = source_classes

    def attach(self, module: BaseTransferModule) -> None:
        """Copies the head twice: one is frozen, the other is trained."""
        super().attach(module)
        if isinstance(module.bottleneck, Bottleneck):
            raise UserError(f"bottleneck: the pretrained head of {type(self).__name__} has none; leave it out")
        self.old = SourceHead(module.backbone.width, self.source_classes)
        pretrained = module.backbone.pretrained
        self.given = {} if pretrained is None else {k: tuple(v.shape) for k, v in pretrained.head.items()}
        self.found = pretrained is not None and self.old.take(pretrained.head)
        self.head = copy.deepcopy(self.old)
        self.old.requires_grad_(False)

    def check(self, module: BaseTransferModule, domains: list[str]) -> None:
        """Also rejects weights without the head.

        Raises:
            UserError: The pretrained weights have no linear head with `source_classes` classes.
        """
        super().check(module, domains)
        if not self.found and module.trainer.ckpt_path is None:
            have = f"have one of {', '.join(f'{k} {v}' for k, v in self.given.items())}" if self.given else "have none"
            raise UserError(
                f"methods: {type(self).__name__} needs the pretrained linear head of {self.source_classes} classes "
                f"(source_classes), but the weights {have}; pass a run, or a classifier with a linear last layer, "
                "as --model.backbone.weights"
            )


class LwF(WithPretrainedHead):
    """Learning without forgetting: the old head keeps its outputs on the new data (Li and Hoiem, ECCV 2016).

    `mean CE(softmax(old output of the start / T), softmax(old output now / T))`.

    Args:
        source_classes: Number of classes of the pretrained head.
        weight: lambda_o; 1 in the paper.
        temperature: T; 2 in the paper.
    """

    supported_settings = ("several sources", "generalisation", "source-free")

    def __init__(self, source_classes: int, weight: LossWeight = 1.0, temperature: float = 2.0) -> None:
        super().__init__(source_classes, weight)
        self.temperature = temperature

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the term on the target, or else the source."""
        view = target or source
        assert view is not None
        with torch.no_grad():
            taught = (self.old(self.before(view.x)) / self.temperature).softmax(1)
        return soft_cross_entropy(self.head(view.pooled) / self.temperature, taught).mean()


class CoTuning(WithPretrainedHead):
    """Fine-tunes the pretrained head too, with source labels related to the target's (You et al., NeurIPS 2020).

    `mean CE(head_S(f(x)), p(y_S | y))` with the relation p(y_S | y) the mean of the pretrained network's source
    probabilities over the samples of class y (the paper's direct approach), as a running mean instead of a pass before
    training.

    Args:
        source_classes: Number of classes of the pretrained head.
        weight: lambda; 2.3 in the paper.
    """

    supported_settings = ("several sources", "generalisation")

    def __init__(self, source_classes: int, weight: LossWeight = 2.3) -> None:
        super().__init__(source_classes, weight)

    def attach(self, module: BaseTransferModule) -> None:
        """Initialises the relation uniformly."""
        super().attach(module)
        shape = (module.num_outputs, self.source_classes)
        self.register_buffer("relation", torch.full(shape, 1e-3 / self.source_classes))

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the term on the labelled samples of the target, or else the source."""
        known = (view.with_labels for view in (target, source) if view is not None)
        view = next((view for view in known if view is not None), None)
        if view is None:
            raise UserError("methods: CoTuning needs labelled samples, but the training data has none")
        relation = self.get_buffer("relation")
        if self.training:
            with torch.no_grad():
                relation += self.shares(view.y).T @ self.old(self.before(view.x)).softmax(1)
        share = relation / relation.sum(1, keepdim=True)
        return soft_cross_entropy(self.head(view.pooled), self.shares(view.y) @ share).mean()

    def shares(self, y: Tensor) -> Tensor:
        """Converts class numbers (B,) to one-hot vectors (B, C); returns soft labels (B, C) unchanged."""
        return y if y.is_floating_point() else F.one_hot(y, len(self.get_buffer("relation"))).float()
