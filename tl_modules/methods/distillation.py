"""Distillation: a student is trained to match a teacher's outputs or features.

x --> [ student ] --> output, features --> distance <-- output, features <-- [ teacher, frozen ] <-- x
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tl_modules.batch import samples
from tl_modules.batch.current_domain import passing
from tl_modules.batch.output import DomainOutput
from tl_modules.batch.protocol import BaseBackbone, BaseTransferModule
from tl_modules.batch.samples import Batch, Padded
from tl_modules.errors import UserError
from tl_modules.methods.base import check_trains, sized_by_checkpoint
from tl_modules.methods.functional import (
    angles,
    attention_distance,
    correlation_distance,
    decoupled_divergence,
    energy,
    relative_distances,
    smaller,
    tempered_divergence,
)
from tl_modules.methods.regularization import stage_outputs
from tl_modules.methods.schedules import LossWeight
from tl_modules.methods.teacher import Distillation, Domain

__all__ = ["DIST", "DKD", "RKD", "AttentionTransfer", "Distill", "Hint"]


class OfOutputs(Distillation):
    """Compares outputs; a teacher's classes are reordered to match the student's."""

    of_outputs = True

    def ask(self, module: BaseTransferModule, network: Any, x: Any, domain: str) -> Any:
        """Returns the teacher's outputs, a tree; logits (B, C) in the order of the student's classes."""
        output = network.forward_domains({domain: Batch(x)})[domain].output
        mine, its = module.class_names, network.class_names
        return output[:, [its.index(name) for name in mine]] if mine and its and mine != its else output

    def mean(self, module: BaseTransferModule, said: Sequence[Any]) -> Any:
        """Averages outputs; for classes, returns the logarithms of the mean probabilities."""
        if not module.is_classification:
            return super().mean(module, said)
        return torch.stack([logits.log_softmax(1) for logits in said]).logsumexp(0)


class Distill(OfOutputs):
    """Knowledge distillation: the teacher's softened probabilities are the labels (Hinton et al., 2015).

    `T^2 mean KL(softmax(teacher / T) || softmax(student / T))`; without classes, the mean squared difference of the
    outputs. If there are labels, the task's loss is kept (`--model.target_weight`).

    Args:
        teacher: The directory of its run, or several: the mean of their probabilities (outputs) is used.
        weight: The term's weight.
        domain: The domain of its samples: "target" (without one, the source), "source" or "both".
        temperature: T.
    """

    def __init__(
        self,
        teacher: list[Path] | Path,
        weight: LossWeight = 1.0,
        domain: Domain = "target",
        temperature: float = 4.0,
    ) -> None:
        super().__init__(teacher, weight, domain)
        self.temperature = _positive("temperature", temperature)

    def distance(self, module: BaseTransferModule, domain: str, out: DomainOutput, said: Any) -> Tensor:
        """Computes the divergence, or the squared error."""
        if module.is_classification:
            return tempered_divergence(out.output, said, self.temperature)
        errors: list[Tensor] = []

        def compare(student: Any, teacher: Any) -> None:
            if isinstance(student, Padded):
                student, teacher = student.values[student.mask], teacher.values[student.mask]
            errors.append(F.mse_loss(student, teacher))

        if samples.kind(out.output) != samples.kind(said):
            mine, its = samples.describe(out.output), samples.describe(said)
            raise UserError(
                f"methods: Distill needs outputs of one shape; the student's are {mine}, its teacher's {its}"
            )
        samples.map_leaves(compare, out.output, said)
        return torch.stack(errors).mean()


class DKD(OfOutputs):
    """Decoupled distillation: separate weights for the class itself and the other classes (Zhao et al., CVPR 2022).

    `T^2 (alpha KL(p_y, 1 - p_y) + beta KL(the others among themselves))`, with y the label, or, if it is hidden, the
    teacher's prediction. The paper raises the weight over the first epochs (`RampWeight`).

    Args:
        teacher: The directory of its run, or several: the mean of their probabilities is used.
        weight: The term's weight.
        domain: The domain of its samples: "target" (without one, the source), "source" or "both".
        alpha: Weight of the class itself; 1 in the paper.
        beta: Weight of the others; in the paper 8 on CIFAR-100, 0.5 on ImageNet.
        temperature: T; in the paper 4 on CIFAR-100, 1 on ImageNet.
    """

    needs_classes = True

    def __init__(
        self,
        teacher: list[Path] | Path,
        weight: LossWeight = 1.0,
        domain: Domain = "target",
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
    ) -> None:
        super().__init__(teacher, weight, domain)
        self.alpha, self.beta, self.temperature = alpha, beta, _positive("temperature", temperature)

    def distance(self, module: BaseTransferModule, domain: str, out: DomainOutput, said: Any) -> Tensor:
        """Computes both parts."""
        y = said.argmax(1) if out.y is None else out.y
        y = y.argmax(1) if y.is_floating_point() else y  # soft labels
        return decoupled_divergence(out.output, said, y, self.alpha, self.beta, self.temperature)


class DIST(OfOutputs):
    """Matches relations rather than values, for a teacher far stronger than the student (Huang et al., NeurIPS 2022).

    `T^2 (beta mean_i (1 - r(p_i, q_i)) + gamma mean_c (1 - r(p_c, q_c)))` with r Pearson's correlation of the
    probabilities at temperature T: of a sample's classes, and of a class over the batch.

    Args:
        teacher: The directory of its run, or several: the mean of their probabilities is used.
        weight: The term's weight.
        domain: The domain of its samples: "target" (without one, the source), "source" or "both".
        beta: Weight within samples; in the paper 2 on CIFAR-100, 1 on ImageNet.
        gamma: Weight within classes; in the paper 2 on CIFAR-100, 1 on ImageNet.
        temperature: T; in the paper 4 on CIFAR-100, 1 on ImageNet.
    """

    needs_classes = True

    def __init__(
        self,
        teacher: list[Path] | Path,
        weight: LossWeight = 1.0,
        domain: Domain = "target",
        beta: float = 2.0,
        gamma: float = 2.0,
        temperature: float = 4.0,
    ) -> None:
        super().__init__(teacher, weight, domain)
        self.beta, self.gamma, self.temperature = beta, gamma, _positive("temperature", temperature)

    def distance(self, module: BaseTransferModule, domain: str, out: DomainOutput, said: Any) -> Tensor:
        """Computes both relations."""
        p, q = ((logits / self.temperature).softmax(1) for logits in (out.output, said))
        between = self.beta * correlation_distance(p, q) + self.gamma * correlation_distance(p.T, q.T)
        return self.temperature**2 * between


class RKD(Distillation):
    """Matches relations between samples, independent of widths: distances and angles (Park et al., CVPR 2019).

    `distance H(d(student), d(teacher)) + angle H(a(student), a(teacher))` of the pooled features, with d the distances
    of all pairs divided by their mean, a the cosines of all triples, and H the Huber loss.

    Args:
        teacher: The directory of its run; its task may differ.
        weight: The term's weight.
        domain: The domain of its samples: "target" (without one, the source), "source" or "both".
        distance_weight: Weight of the distances; 25 beside cross-entropy in the paper.
        angle_weight: Weight of the angles; 50 in the paper.
    """

    def __init__(
        self,
        teacher: Path,
        weight: LossWeight = 1.0,
        domain: Domain = "target",
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
    ) -> None:
        super().__init__(teacher, weight, domain)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def ask(self, module: BaseTransferModule, network: Any, x: Any, domain: str) -> Tensor:
        """Returns the teacher's pooled features (B, D)."""
        return pooled_of(network, x, domain)

    def distance(self, module: BaseTransferModule, domain: str, out: DomainOutput, said: Tensor) -> Tensor:
        """Computes the distance over the pairs and triples of the batch."""
        pairs = F.smooth_l1_loss(relative_distances(out.pooled), relative_distances(said))
        return self.distance_weight * pairs + self.angle_weight * F.smooth_l1_loss(angles(out.pooled), angles(said))


class Hint(Distillation):
    """FitNets: the student's features, after a learnt projection, match the teacher's (Romero et al., ICLR 2015).

    `mean (W s + b - t)^2` of pooled features, or of a stage's outputs at each position, with the larger map averaged to
    the size of the smaller one. The paper trains on hints first; here it is a term like any other.

    Args:
        teacher: The directory of its run; its task may differ.
        weight: The term's weight.
        domain: The domain of its samples: "target" (without one, the source), "source" or "both".
        stage: Stage of both image backbones, counted from the input or, if negative, from the end; None: pooled
            features.
    """

    def __init__(
        self, teacher: Path, weight: LossWeight = 1.0, domain: Domain = "target", stage: int | None = None
    ) -> None:
        super().__init__(teacher, weight, domain)
        self.stage = stage

    def attach(self, module: BaseTransferModule) -> None:
        """Builds the projection; without the teacher it takes its size from a checkpoint."""
        super().attach(module)
        network = None
        with suppress(UserError):  # raised when training starts; a student that is only tested needs no teacher
            (network,) = self.teachers(module)
        if network is not None:
            self.projection = nn.Linear(self._width(module), self._width(network))
        else:
            self.projection = nn.utils.skip_init(nn.Linear, self._width(module), 0)  # type: ignore[no-untyped-call]
            sized_by_checkpoint(self.projection, "weight", "bias")

    def _width(self, module: Any) -> int:
        if self.stage is None:
            return cast(int, module.width)
        backbone = module.backbone
        if not hasattr(backbone, "mean"):
            raise UserError(f"stage: Hint compares stages of image backbones, not of {type(backbone).__name__}; "
                            "leave it out")  # fmt: skip
        side, training = backbone.data_defaults.get("image_size", 64), backbone.training
        x = torch.zeros(1, len(backbone.mean), side, side, device=backbone.mean.device)
        with torch.no_grad():
            maps = self._maps(backbone.eval(), backbone, x)
        backbone.train(training)
        return maps.shape[1]

    def _maps(self, backbone: BaseBackbone, run: Callable[[Any], Any], x: Any) -> Tensor:
        return positions_last(stage_outputs(backbone, run, x)[self._place(backbone)])

    def _place(self, backbone: BaseBackbone) -> int:
        """Returns the stage, counted from the end, because the first stages do not run if they are cached."""
        assert self.stage is not None
        count = len(backbone.stages())
        if not -count <= self.stage < count:
            raise UserError(f"stage: {self.stage} is not one of the {count} stages of {type(backbone).__name__}")
        return self.stage if self.stage < 0 else self.stage - count

    def check(self, module: BaseTransferModule, domains: list[str]) -> None:
        """Also rejects a stage that never trains.

        Raises:
            UserError: The stage is frozen for the whole run.
        """
        super().check(module, domains)
        if self.stage is not None:
            check_trains(self, module, [module.backbone.stages()[self.stage]], f"stage {self.stage}")

    def ask(self, module: BaseTransferModule, network: Any, x: Any, domain: str) -> Tensor:
        """Returns the teacher's pooled features (B, D), or its stage's maps (B, C, *positions)."""
        if self.stage is None:
            return pooled_of(network, x, domain)
        with passing([(domain, samples.count(x))]):
            return self._maps(network.backbone, network.backbone, x).float()

    def distance(self, module: BaseTransferModule, domain: str, out: DomainOutput, said: Tensor) -> Tensor:
        """Computes the squared error."""
        if self.stage is None:
            return F.mse_loss(self.projection(out.pooled), said)
        if len(module.backbone.stages()) + self._place(module.backbone) not in module.trainable:
            return nothing(module)
        maps = self._maps(module.backbone, lambda x: module.forward_extra(x, domain), out.x).to(said.dtype)
        student, teacher = smaller(maps, said)
        return F.mse_loss(self.projection(student.movedim(1, -1)), teacher.movedim(1, -1))


class AttentionTransfer(Distillation):
    """Attention transfer: matches where student and teacher look (Zagoruyko and Komodakis, ICLR 2017).

    `sum_l mean (a_l / ||a_l|| - b_l / ||b_l||)^2` with a_l, b_l the mean over the channels of x^2 at each position of a
    stage's output; stages are paired from the last one on, and the larger map is averaged to the size of the smaller
    one. Frozen stages have no term.

    Args:
        teacher: The directory of its run, with an image backbone; its task may differ.
        weight: The term's weight; 1,000 in the paper.
        domain: The domain of its samples: "target" (without one, the source), "source" or "both".
    """

    def __init__(self, teacher: Path, weight: LossWeight = 1000.0, domain: Domain = "target") -> None:
        super().__init__(teacher, weight, domain)

    def check(self, module: BaseTransferModule, domains: list[str]) -> None:
        """Also rejects a backbone of which no stage ever trains.

        Raises:
            UserError: All stages are frozen for the whole run.
        """
        super().check(module, domains)
        check_trains(self, module, module.backbone.stages(), "the backbone's stages")

    def ask(self, module: BaseTransferModule, network: Any, x: Any, domain: str) -> tuple[Tensor, ...]:
        """Returns the teacher's attention after each stage, (B, *positions) each."""
        with passing([(domain, samples.count(x))]):
            outputs = stage_outputs(network.backbone, network.backbone, x)
        return tuple(energy_of(network.backbone, output) for output in outputs)

    def distance(self, module: BaseTransferModule, domain: str, out: DomainOutput, said: Sequence[Tensor]) -> Tensor:
        """Computes the sum over the trainable stages."""
        outputs = stage_outputs(module.backbone, lambda x: module.forward_extra(x, domain), out.x)
        stages = reversed(range(len(module.backbone.stages())))
        pairs = [
            (energy_of(module.backbone, output), other)
            for stage, output, other in zip(stages, reversed(outputs), reversed(said), strict=False)
            if stage in module.trainable
        ]
        if any(one.ndim != other.ndim for one, other in pairs):
            raise UserError("methods: AttentionTransfer needs maps of one kind from both networks, images' or tokens'")
        return torch.stack([attention_distance(*pair) for pair in pairs]).sum() if pairs else nothing(module)


def energy_of(backbone: BaseBackbone, output: Tensor) -> Tensor:
    """Computes a backbone's attention after a stage, (B, *positions).

    Raises:
        UserError: The stage's output is a vector.
    """
    maps = positions_last(output)
    if maps.ndim < 3:
        kind = type(backbone).__name__
        raise UserError(f"methods: AttentionTransfer needs maps from each stage, which {kind} does not have")
    return energy(maps.float())


def nothing(module: BaseTransferModule) -> Tensor:
    """Returns 0 with a gradient, for steps in which the compared stages are frozen."""
    return 0 * next(p for p in module.network_parameters() if p.requires_grad).sum()


def positions_last(features: Tensor) -> Tensor:
    """Returns maps (B, C, h, w) unchanged, and tokens (B, N, D) as (B, D, N)."""
    return features.transpose(1, 2) if features.ndim == 3 else features


def pooled_of(network: Any, x: Any, domain: str) -> Tensor:
    """Computes a network's pooled features of inputs, (B, D)."""
    return cast(Tensor, network.forward_domains({domain: Batch(x)})[domain].pooled)


def _positive(name: str, value: float) -> float:
    if value <= 0:
        raise UserError(f"{name}: {value:g} must be above 0")
    return value
