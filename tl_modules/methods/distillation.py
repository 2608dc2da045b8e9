"""Distillation: what a student gives is to be what a teacher says, in outputs or in features.

x --> [ student ] --> output, features --> distance <-- what it says <-- [ teacher, frozen ] <-- x
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
    """Compares outputs; a teacher of the same classes in another order is put into the student's."""

    of_outputs = True

    def ask(self, module: BaseTransferModule, network: Any, x: Any, domain: str) -> Any:
        """Its outputs, a tree; logits (B, C) in the order of the student's classes."""
        output = network.forward_domains({domain: Batch(x)})[domain].output
        mine, its = module.class_names, network.class_names
        return output[:, [its.index(name) for name in mine]] if mine and its and mine != its else output

    def mean(self, module: BaseTransferModule, said: Sequence[Any]) -> Any:
        """Outputs; of classes, the logarithms of the mean probabilities."""
        if not module.is_classification:
            return super().mean(module, said)
        return torch.stack([logits.log_softmax(1) for logits in said]).logsumexp(0)


class Distill(OfOutputs):
    """Knowledge distillation: the teacher's softened probabilities are the labels (Hinton et al., 2015).

    `T^2 mean KL(softmax(teacher / T) || softmax(student / T))`; without classes, the mean squared difference of the
    outputs. Beside labels, the task's loss stays as it is (`--model.target_weight`).

    Args:
        teacher: The directory of its run, or several: the mean of their probabilities (outputs) teaches.
        weight: Of the term.
        domain: Whose samples it speaks of: "target" (without one, the source), "source" or "both".
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
        """The divergence, or the squared error."""
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
    """Decoupled distillation: the class itself and the others have a weight each (Zhao et al., CVPR 2022).

    `T^2 (alpha KL(p_y, 1 - p_y) + beta KL(the others among themselves))`, with y the label, or where it is hidden the
    class that the teacher decides for. The paper raises the weight over the first epochs (`RampWeight`).

    Args:
        teacher: The directory of its run, or several: the mean of their probabilities teaches.
        weight: Of the term.
        domain: Whose samples it speaks of: "target" (without one, the source), "source" or "both".
        alpha: Weight of the class itself; the paper takes 1.
        beta: Weight of the others; the paper takes 8 on CIFAR-100, 0.5 on ImageNet.
        temperature: T; the paper takes 4 on CIFAR-100, 1 on ImageNet.
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
        """Both parts."""
        y = said.argmax(1) if out.y is None else out.y
        y = y.argmax(1) if y.is_floating_point() else y  # shares of the classes
        return decoupled_divergence(out.output, said, y, self.alpha, self.beta, self.temperature)


class DIST(OfOutputs):
    """Keeps relations rather than values, for a teacher far stronger than the student (Huang et al., NeurIPS 2022).

    `T^2 (beta mean_i (1 - r(p_i, q_i)) + gamma mean_c (1 - r(p_c, q_c)))` with r Pearson's correlation of the
    probabilities at temperature T: of a sample's classes, and of a class over the batch.

    Args:
        teacher: The directory of its run, or several: the mean of their probabilities teaches.
        weight: Of the term.
        domain: Whose samples it speaks of: "target" (without one, the source), "source" or "both".
        beta: Weight within samples; the paper takes 2 on CIFAR-100, 1 on ImageNet.
        gamma: Weight within classes, likewise.
        temperature: T; the paper takes 4 on CIFAR-100, 1 on ImageNet.
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
        """Both relations."""
        p, q = ((logits / self.temperature).softmax(1) for logits in (out.output, said))
        between = self.beta * correlation_distance(p, q) + self.gamma * correlation_distance(p.T, q.T)
        return self.temperature**2 * between


class RKD(Distillation):
    """Relations of samples, whatever the widths: their distances and angles (Park et al., CVPR 2019).

    `distance H(d(student), d(teacher)) + angle H(a(student), a(teacher))` of the pooled features, with d the distances
    of all pairs divided by their mean, a the cosines of all triples, and H the Huber loss.

    Args:
        teacher: The directory of its run; it may be of another task.
        weight: Of the term.
        domain: Whose samples it speaks of: "target" (without one, the source), "source" or "both".
        distance_weight: Of the distances; the paper takes 25 beside cross-entropy.
        angle_weight: Of the angles; the paper takes 50.
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
        """Its pooled features (B, D)."""
        return pooled_of(network, x, domain)

    def distance(self, module: BaseTransferModule, domain: str, out: DomainOutput, said: Tensor) -> Tensor:
        """Of the pairs and triples of the batch."""
        pairs = F.smooth_l1_loss(relative_distances(out.pooled), relative_distances(said))
        return self.distance_weight * pairs + self.angle_weight * F.smooth_l1_loss(angles(out.pooled), angles(said))


class Hint(Distillation):
    """FitNets: the student's features, through a learnt projection, are to be the teacher's (Romero et al., ICLR 2015).

    `mean (W s + b - t)^2` of pooled features, or of a stage's outputs at each position, where the larger map is
    averaged to the smaller one's size. The paper trains on hints first; here it is a term like any other.

    Args:
        teacher: The directory of its run; it may be of another task.
        weight: Of the term.
        domain: Whose samples it speaks of: "target" (without one, the source), "source" or "both".
        stage: Of both image backbones, counted from the input or, negative, from the end; None: the pooled features.
    """

    def __init__(
        self, teacher: Path, weight: LossWeight = 1.0, domain: Domain = "target", stage: int | None = None
    ) -> None:
        super().__init__(teacher, weight, domain)
        self.stage = stage

    def attach(self, module: BaseTransferModule) -> None:
        """Builds the projection; without the teacher it has the size that it has in a checkpoint."""
        super().attach(module)
        network = None
        with suppress(UserError):  # said when training starts; a student that is tested needs no teacher
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
            raise UserError(f"stage: Hint compares stages of image backbones, and {type(backbone).__name__} is none; "
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
        """The stage, counted from the end: where the first ones are cached, they don't run."""
        assert self.stage is not None
        count = len(backbone.stages())
        if not -count <= self.stage < count:
            raise UserError(f"stage: {self.stage} is none of the {count} stages of {type(backbone).__name__}")
        return self.stage if self.stage < 0 else self.stage - count

    def check(self, module: BaseTransferModule, domains: list[str]) -> None:
        """Also refuses a stage that never trains.

        Raises:
            UserError: It is closed for good.
        """
        super().check(module, domains)
        if self.stage is not None:
            check_trains(self, module, [module.backbone.stages()[self.stage]], f"stage {self.stage}")

    def ask(self, module: BaseTransferModule, network: Any, x: Any, domain: str) -> Tensor:
        """Its pooled features (B, D), or its stage's maps (B, C, *positions)."""
        if self.stage is None:
            return pooled_of(network, x, domain)
        with passing([(domain, samples.count(x))]):
            return self._maps(network.backbone, network.backbone, x).float()

    def distance(self, module: BaseTransferModule, domain: str, out: DomainOutput, said: Tensor) -> Tensor:
        """The squared error."""
        if self.stage is None:
            return F.mse_loss(self.projection(out.pooled), said)
        if len(module.backbone.stages()) + self._place(module.backbone) not in module.trainable:
            return nothing(module)
        maps = self._maps(module.backbone, lambda x: module.forward_extra(x, domain), out.x).to(said.dtype)
        student, teacher = smaller(maps, said)
        return F.mse_loss(self.projection(student.movedim(1, -1)), teacher.movedim(1, -1))


class AttentionTransfer(Distillation):
    """The student is to look where the teacher looks (Zagoruyko and Komodakis, ICLR 2017).

    `sum_l mean (a_l / ||a_l|| - b_l / ||b_l||)^2` with a_l, b_l the mean over the channels of x^2 at each position of
    what leaves a stage; stages are paired from the last one on, and the larger map is averaged to the smaller one's
    size. What is closed has no term.

    Args:
        teacher: The directory of its run, of image backbones; it may be of another task.
        weight: Of the term; the paper takes 1,000.
        domain: Whose samples it speaks of: "target" (without one, the source), "source" or "both".
    """

    def __init__(self, teacher: Path, weight: LossWeight = 1000.0, domain: Domain = "target") -> None:
        super().__init__(teacher, weight, domain)

    def check(self, module: BaseTransferModule, domains: list[str]) -> None:
        """Also refuses a backbone of which no stage ever trains.

        Raises:
            UserError: All are closed for good.
        """
        super().check(module, domains)
        check_trains(self, module, module.backbone.stages(), "the backbone's stages")

    def ask(self, module: BaseTransferModule, network: Any, x: Any, domain: str) -> tuple[Tensor, ...]:
        """Where it looks after each stage, (B, *positions) each."""
        with passing([(domain, samples.count(x))]):
            outputs = stage_outputs(network.backbone, network.backbone, x)
        return tuple(energy_of(network.backbone, output) for output in outputs)

    def distance(self, module: BaseTransferModule, domain: str, out: DomainOutput, said: Sequence[Tensor]) -> Tensor:
        """The sum over the stages that are open."""
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
    """Where a backbone looks after a stage, (B, *positions).

    Raises:
        UserError: It gives vectors there.
    """
    maps = positions_last(output)
    if maps.ndim < 3:
        kind = type(backbone).__name__
        raise UserError(f"methods: AttentionTransfer needs maps from each stage, which {kind} does not give")
    return energy(maps.float())


def nothing(module: BaseTransferModule) -> Tensor:
    """0 with a gradient, for steps in which what a term is about is closed."""
    return 0 * next(p for p in module.network_parameters() if p.requires_grad).sum()


def positions_last(features: Tensor) -> Tensor:
    """Maps (B, C, h, w) as they are, tokens (B, N, D) as (B, D, N)."""
    return features.transpose(1, 2) if features.ndim == 3 else features


def pooled_of(network: Any, x: Any, domain: str) -> Tensor:
    """A network's vectors of inputs, (B, D)."""
    return cast(Tensor, network.forward_domains({domain: Batch(x)})[domain].pooled)


def _positive(name: str, value: float) -> float:
    if value <= 0:
        raise UserError(f"{name}: {value:g} must be above 0")
    return value
