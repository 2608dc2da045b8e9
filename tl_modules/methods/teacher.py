"""What every method with a teacher is: the network of another run says what the student is to give.

The teacher is given the batch's x, i.e. samples of the data's size as the student's backbone prepares them, not yet
normalised: each backbone normalises on its own. It is no part of the module, so that no optimizer, checkpoint or count
of parameters holds it. Where samples are the same in every epoch, `FeatureCache` asks it once.
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
        if not module.backbone.prepares_like(network.backbone):
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


def _owners(domains: Collection[str]) -> list[str]:
    return [owner for owner in ("source", "target") if any(name.partition("/")[0] == owner for name in domains)]


def _words(schema: Any) -> str:
    return short(f"{len(value)} {key} columns" if isinstance(value, list) else key for key, value in schema.items())


def _checksum(networks: Sequence[nn.Module]) -> int:
    """A CRC-32 over all weights and buffers."""
    total = 0
    for network in networks:
        for tensor in network.state_dict().values():
            flat: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            total = zlib.crc32(flat.numpy(), total)
    return total
