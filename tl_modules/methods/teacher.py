"""The base class of methods with a teacher: another run's network provides the student's targets.

The teacher gets the batch's x: samples at the data's size, prepared by the student's backbone but not yet normalised,
since each backbone normalises on its own. It is not part of the module, so that optimizers, checkpoints and parameter
counts exclude it. If samples are the same in every epoch, `FeatureCache` runs it once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tl_modules.batch import samples
from tl_modules.batch.compat import attached
from tl_modules.batch.output import DomainOutput
from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.errors import UserError, short
from tl_modules.methods.base import Method
from tl_modules.methods.schedules import LossWeight

Domain = Literal["target", "source", "both"]


class Distillation(Method):
    """The distance between the student's and a teacher's outputs; a subclass implements `ask` and `distance`.

    Args:
        teacher: The directory of its run (`runs/NAME` is the newest version), or several of them.
        weight: The term's weight.
        domain: The domain of its samples, labelled or not: the target (without one, the source), the source, or both,
            averaged.
    """

    needs_raw_input = True  # unless all of the teacher's outputs are cached
    supported_settings = ("several sources", "generalisation", "partial", "source-free")
    # `runs/` is above `methods/`: it sets this to its `load_run`, and the command line adds the trusted names
    read_run: ClassVar[Callable[[Path], Any]]
    of_outputs = False  # whether the outputs of teacher and student must mean the same

    def __init__(self, teacher: list[Path] | Path, weight: LossWeight = 1.0, domain: Domain = "target") -> None:
        super().__init__(weight)
        self.paths = [Path(path) for path in (teacher if isinstance(teacher, list) else [teacher])]
        self.domain = domain
        self.networks: list[Any] = []  # a list, so that they are not submodules
        if not self.paths:
            raise UserError("teacher: pass the directory of a run, e.g. runs/NAME")
        if len(self.paths) > 1 and not self.of_outputs:
            raise UserError(f"teacher: {type(self).__name__} compares features, so it takes a single run; leave "
                            f"{short(self.paths[1:])} out")  # fmt: skip

    def attach(self, module: BaseTransferModule) -> None:
        """Registers a checksum of the teachers' weights, by which a resumed run recognises them."""
        self.register_buffer("teacher_sum", torch.tensor(-1))

    # The teacher

    def teachers(self, module: BaseTransferModule) -> list[Any]:
        """Returns the networks, loaded on first use: a student that is only tested does not need them.

        Raises:
            UserError: A teacher cannot be loaded, or does not suit this student.
        """
        if not self.networks:
            with torch.random.fork_rng([]):  # loading a teacher must not change the student's random numbers
                networks = [self._read(path) for path in self.paths]
            for path, network in zip(self.paths, networks, strict=True):
                self.check_teacher(module, network, path)
                network.requires_grad_(False).eval()
            self.networks = networks
        for network in self.networks:
            if (network.device, network.dtype) != (module.device, module.dtype):
                network.to(module.device, module.dtype)
        return self.networks

    def _read(self, path: Path) -> Any:
        try:
            return type(self).read_run(path)
        except UserError as error:
            raise UserError(f"teacher: {str(error).removeprefix('run: ')}") from error

    def check_teacher(self, module: BaseTransferModule, network: Any, path: Path) -> None:
        """Rejects a teacher with other inputs, or with outputs of another meaning.

        Raises:
            UserError: The teacher does not suit the student.
        """
        if not isinstance(network, BaseTransferModule):
            raise UserError(f"teacher: {path} is a run of {type(network).__name__}, which has no backbone and head")
        student, teacher = (each.schema.get("x") or {} for each in (module, network))
        if student and teacher and student != teacher:
            raise UserError(f"teacher: {path} reads {_words(teacher)}, but the data is {_words(student)}; use a "
                            "teacher of such data")  # fmt: skip
        if not module.backbone.prepares_like(network.backbone):
            raise UserError(
                f"teacher: {path} prepares its inputs in another way than {type(module.backbone).__name__}; use a "
                "teacher and a student of the same kind, e.g. two image backbones"
            )
        if not self.of_outputs:
            return
        if module.is_classification != network.is_classification or module.num_outputs != network.num_outputs:
            raise UserError(
                f"teacher: {path} is a {type(network).__name__} with {network.num_outputs} outputs, the student a "
                f"{type(module).__name__} with {module.num_outputs}; use a teacher of the same task"
            )
        mine, its = module.class_names, network.class_names
        if mine and its and set(mine) != set(its):
            raise UserError(f"teacher: the classes of {path} are {short(its)}, the student's are {short(mine)}; use "
                            "a teacher with the same classes")  # fmt: skip

    def check(self, module: BaseTransferModule, domains: list[str]) -> None:
        """Also rejects other teachers than the run began with.

        Raises:
            UserError: The teachers differ, or there is no source.
        """
        super().check(module, domains)
        name = type(self).__name__
        if self.domain == "source" and "source" not in _owners(domains):
            raise UserError(f"domain: {name} needs the source's samples, but there is no source; pass --data.source")
        known, total = self.get_buffer("teacher_sum"), _checksum(self.teachers(module))
        if int(known) not in (-1, total):
            raise UserError(
                f"teacher: {short(self.paths)} is not the teacher this run began with; restore it, or start a new run"
            )
        known.fill_(total)

    @torch.no_grad()
    def answer(self, module: BaseTransferModule, x: Any, domain: str) -> Any:
        """Computes the teacher's outputs for prepared inputs, a tree; of several teachers, their mean.

        Args:
            module: The student.
            x: (B, ...).
            domain: "source" or "target", for a teacher that treats domains differently (`DSBN`).

        Raises:
            UserError: The teacher cannot read the inputs.
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
        """Computes the outputs of one teacher, a tree."""
        raise NotImplementedError

    def mean(self, module: BaseTransferModule, said: Sequence[Any]) -> Any:
        """Averages the outputs of several teachers."""
        return samples.map_leaves(lambda *each: torch.stack(each).mean(0), *said)

    # The term

    def owners(self, domains: Collection[str]) -> list[str]:
        """Returns which of "source" and "target" it uses, if the training data are `domains`."""
        there = _owners(domains)
        return there if self.domain == "both" else [self.domain if self.domain in there else there[-1]]

    def taught(self, module: BaseTransferModule, domain: str, out: DomainOutput) -> Any:
        """Returns the teacher's cached outputs for the samples, or computes them now."""
        name = next(name for name, method in module.named_methods() if method is self)
        known = (out.taught or {}).get(name)
        return self.answer(module, out.x, domain) if known is None else known

    def forward(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> Tensor:
        """Computes the mean over its domains."""
        outputs = {name: out for name, out in (("source", source), ("target", target)) if out is not None}
        terms = [
            self.distance(module, name, outputs[name], self.taught(module, name, outputs[name]))
            for name in self.owners(outputs)
        ]
        return torch.stack(terms).mean()

    def distance(self, module: BaseTransferModule, domain: str, out: DomainOutput, said: Any) -> Tensor:
        """Computes the distance between the student and the teacher's outputs, a scalar."""
        raise NotImplementedError


def _owners(domains: Collection[str]) -> list[str]:
    return [owner for owner in ("source", "target") if any(name.partition("/")[0] == owner for name in domains)]


def _words(schema: Any) -> str:
    return short(f"{len(value)} {key} columns" if isinstance(value, list) else key for key, value in schema.items())


def _checksum(networks: Sequence[nn.Module]) -> int:
    """Computes a CRC-32 over all weights and buffers."""
    total = 0
    for network in networks:
        for tensor in network.state_dict().values():
            flat: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            total = zlib.crc32(flat.numpy(), total)
    return total
