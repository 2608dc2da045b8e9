"""A teacher, the network of another run, says what the student is to give.

    x --> [ student ] --> output, features --> distance <-- what it says <-- [ teacher, frozen ] <-- x

The teacher is given the batch's x, i.e. samples of the data's size as the student's backbone prepares them, not yet
normalised: each backbone normalises on its own. It is no part of the module, so that no optimizer, checkpoint or count
of parameters holds it. Where samples are the same in every epoch, `FeatureCache` asks it once.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tl_modules.batch import samples
from tl_modules.batch.compat import attached
from tl_modules.batch.current_domain import passing
from tl_modules.batch.output import DomainOutput
from tl_modules.batch.protocol import BaseBackbone, BaseTransferModule
from tl_modules.batch.samples import Batch, Padded
from tl_modules.errors import UserError, short
from tl_modules.methods.base import Method, check_trains, sized_by_checkpoint
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

__all__ = ["DIST", "DKD", "RKD", "AttentionTransfer", "Distill", "Hint"]

Domain = Literal["target", "source", "both"]


class Distillation(Method):
    """The distance of what the student gives to what a teacher says; a subclass writes `ask` and `distance`.

    Args:
        teacher: The directory of its run, `runs/NAME` being the newest version, or several of them.
        weight: Of the term.
        domain: Whose samples it speaks of, labelled or not: the target's (where there is none, the source's), the
            source's, or both, of which the mean counts.
    """

    needs_raw_input = True  # unless all that the teacher says is cached
    supported_settings = ("several sources", "generalisation", "partial", "source-free")
    # runs are in a room above this one, which puts its `load_run` here, and the command line what it trusts
    read_run: ClassVar[Callable[[Path], Any]]
    of_outputs = False  # whether teacher and student must mean the same by their outputs

    def __init__(self, teacher: list[Path] | Path, weight: LossWeight = 1.0, domain: Domain = "target") -> None:
        super().__init__(weight)
        self.paths = [Path(path) for path in (teacher if isinstance(teacher, list) else [teacher])]
        self.domain = domain
        self.networks: list[Any] = []  # a list, so that they are no submodules
        if not self.paths:
            raise UserError("teacher: give the directory of a run, e.g. runs/NAME")
        if len(self.paths) > 1 and not self.of_outputs:
            raise UserError(f"teacher: {type(self).__name__} compares features, so that it takes one run; leave "
                            f"{short(self.paths[1:])} out")  # fmt: skip

    def attach(self, module: BaseTransferModule) -> None:
        """Makes room for a sum over the teachers' weights, by which a resumed run knows them again."""
        self.register_buffer("teacher_sum", torch.tensor(-1))

    # The teacher

    def teachers(self, module: BaseTransferModule) -> list[Any]:
        """The networks, read when they are first asked for: a student that is only tested needs none.

        Raises:
            UserError: One cannot be read, or cannot teach this student.
        """
        if not self.networks:
            with torch.random.fork_rng([]):  # the student's random numbers are what they are without a teacher
                networks = [type(self).read_run(path) for path in self.paths]
            for path, network in zip(self.paths, networks, strict=True):
                self.check_teacher(module, network, path)
                network.requires_grad_(False).eval()
            self.networks = networks
        for network in self.networks:
            if (network.device, network.dtype) != (module.device, module.dtype):
                network.to(module.device, module.dtype)
        return self.networks

    def check_teacher(self, module: BaseTransferModule, network: Any, path: Path) -> None:
        """Refuses a teacher that reads other inputs, or means something else by its outputs.

        Raises:
            UserError: It does.
        """
        if not isinstance(network, BaseTransferModule):
            raise UserError(f"teacher: {path} is a run of {type(network).__name__}, which has no backbone and head")
        student, teacher = (each.schema.get("x") or {} for each in (module, network))
        if student and teacher and student != teacher:
            raise UserError(f"teacher: {path} reads {_words(teacher)}, and the data are {_words(student)}; take a "
                            "teacher of such data")  # fmt: skip
        if not _alike(module.backbone.prepare, network.backbone.prepare):
            raise UserError(
                f"teacher: {path} prepares its inputs in another way than {type(module.backbone).__name__}; take a "
                "teacher and a student of one kind, e.g. two image backbones"
            )
        if not self.of_outputs:
            return
        if module.is_classification != network.is_classification or module.num_outputs != network.num_outputs:
            raise UserError(
                f"teacher: {path} is a {type(network).__name__} with {network.num_outputs} outputs, the student a "
                f"{type(module).__name__} with {module.num_outputs}; take a teacher of the same task"
            )
        mine, its = module.class_names, network.class_names
        if mine and its and set(mine) != set(its):
            raise UserError(f"teacher: the classes of {path} are {short(its)}, the student's are {short(mine)}; take "
                            "a teacher of the same classes")  # fmt: skip

    def check(self, module: BaseTransferModule, domains: list[str]) -> None:
        """Also refuses to go on with other teachers than the run began with.

        Raises:
            UserError: They are others, or there is no source to speak of.
        """
        super().check(module, domains)
        name = type(self).__name__
        if self.domain == "source" and "source" not in _owners(domains):
            raise UserError(
                f"domain: {name} is to speak of the source's samples, and there is none; give --data.source"
            )
        known, total = self.get_buffer("teacher_sum"), _checksum(self.teachers(module))
        if int(known) not in (-1, total):
            raise UserError(
                f"teacher: {short(self.paths)} is not what this run began with; put that back, or start a new run"
            )
        known.fill_(total)

    @torch.no_grad()
    def answer(self, module: BaseTransferModule, x: Any, domain: str) -> Any:
        """What the teacher says of prepared inputs, a tree; of several teachers, their mean.

        Args:
            module: The student.
            x: (B, ...).
            domain: "source" or "target", for a teacher that treats them apart (`DomainBatchNorm`).

        Raises:
            UserError: It cannot read them.
        """
        said = []
        for path, network in zip(self.paths, self.teachers(module), strict=True):
            try:
                with module.trainer.precision_plugin.forward_context() if attached(module) else nullcontext():
                    said.append(self.ask(module, network, x, domain))
            except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                if "memory" in str(error):
                    raise
                why = (str(error) or type(error).__name__).splitlines()[0][:120]
                raise UserError(
                    f"teacher: {path} cannot read the student's samples, of {samples.describe(x)} ({why})"
                ) from error
        return said[0] if len(said) == 1 else self.mean(module, said)

    def ask(self, module: BaseTransferModule, network: Any, x: Any, domain: str) -> Any:
        """What one teacher says, a tree."""
        raise NotImplementedError

    def mean(self, module: BaseTransferModule, said: Sequence[Any]) -> Any:
        """The mean of what several teachers say."""
        return samples.map_leaves(lambda *each: torch.stack(each).mean(0), *said)

    # The term

    def owners(self, domains: Collection[str]) -> list[str]:
        """Whose samples it speaks of, of "source" and "target", where the training data are `domains`."""
        there = _owners(domains)
        return there if self.domain == "both" else [self.domain if self.domain in there else there[-1]]

    def taught(self, module: BaseTransferModule, domain: str, out: DomainOutput) -> Any:
        """What the teacher has said of the samples before, or says of them now."""
        name = next(name for name, method in module.named_methods() if method is self)
        known = (out.taught or {}).get(name)
        return self.answer(module, out.x, domain) if known is None else known

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """The mean over the domains that it speaks of."""
        outputs = {name: out for name, out in (("source", source), ("target", target)) if out is not None}
        terms = [
            self.distance(module, name, outputs[name], self.taught(module, name, outputs[name]))
            for name in self.owners(outputs)
        ]
        return torch.stack(terms).mean()

    def distance(self, module: BaseTransferModule, domain: str, out: DomainOutput, said: Any) -> Tensor:
        """How far the student is from what the teacher says, a scalar."""
        raise NotImplementedError


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
        width = 0
        with suppress(UserError):  # said when training starts; a student that is tested needs no teacher
            (network,) = self.teachers(module)
            width = self._width(network)
        if width:
            self.projection = nn.Linear(self._width(module), width)
        else:
            self.projection = nn.utils.skip_init(nn.Linear, self._width(module), 0)
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
        outputs = stage_outputs(backbone, run, x)
        assert self.stage is not None
        if not -len(outputs) <= self.stage < len(outputs):
            raise UserError(f"stage: {self.stage} is none of the {len(outputs)} stages of {type(backbone).__name__}")
        return positions_last(outputs[self.stage])

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
            return tuple(_energies(network.backbone, network.backbone, x))

    def distance(self, module: BaseTransferModule, domain: str, out: DomainOutput, said: Sequence[Tensor]) -> Tensor:
        """The sum over the stages that are open."""
        mine = _energies(module.backbone, lambda x: module.forward_extra(x, domain), out.x)
        pairs = list(zip(reversed(range(len(mine))), reversed(mine), reversed(said), strict=False))
        if any(one.ndim != other.ndim for _, one, other in pairs):
            raise UserError("methods: AttentionTransfer needs maps of one kind from both networks, images' or tokens'")
        open_pairs = [attention_distance(one, other) for stage, one, other in pairs if stage in module.trainable]
        if not open_pairs:
            return 0 * next(p for p in module.network_parameters() if p.requires_grad).sum()
        return torch.stack(open_pairs).sum()


def _energies(backbone: BaseBackbone, run: Callable[[Any], Any], x: Any) -> list[Tensor]:
    maps = [positions_last(output) for output in stage_outputs(backbone, run, x)]
    if not maps or any(each.ndim < 3 for each in maps):
        raise UserError(
            f"methods: AttentionTransfer needs maps from each stage, which {type(backbone).__name__} has not"
        )
    return [energy(each.float()) for each in maps]


def positions_last(features: Tensor) -> Tensor:
    """Maps (B, C, h, w) as they are, tokens (B, N, D) as (B, D, N)."""
    return features.transpose(1, 2) if features.ndim == 3 else features


def pooled_of(network: Any, x: Any, domain: str) -> Tensor:
    """A network's vectors of inputs, (B, D)."""
    return cast(Tensor, network.forward_domains({domain: Batch(x)})[domain].pooled)


def _owners(domains: Collection[str]) -> list[str]:
    return [owner for owner in ("source", "target") if any(name.partition("/")[0] == owner for name in domains)]


def _positive(name: str, value: float) -> float:
    if value <= 0:
        raise UserError(f"{name}: {value:g} must be above 0")
    return value


def _words(schema: Any) -> str:
    return short(f"{len(value)} {key} columns" if isinstance(value, list) else key for key, value in schema.items())


def _alike(one: Any, other: Any) -> bool:
    """Whether two functions or small objects prepare inputs in the same way."""
    one, other = (getattr(each, "__func__", each) for each in (one, other))
    with suppress(Exception):  # whatever cannot be pickled is another one
        return bool(one == other or pickle.dumps(one) == pickle.dumps(other))
    return False


def _checksum(networks: Sequence[nn.Module]) -> int:
    """A CRC-32 over all weights and buffers."""
    total = 0
    for network in networks:
        for tensor in network.state_dict().values():
            flat: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            total = zlib.crc32(flat.numpy(), total)
    return total
