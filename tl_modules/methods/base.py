"""What every method is: one weighted term of the loss.

An author reads the class. What follows are the module's checks, of which `check_trains` and `check_head` serve methods.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tl_modules.batch.output import DomainOutput
from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.batch.samples import Batch
from tl_modules.errors import UserError
from tl_modules.methods.schedules import LossWeight

__all__ = ["Method"]


class Method(nn.Module):
    """One term of the loss, computed from the outputs of the source (several sources in one) and of the target.

    A subclass writes `forward`; it may build what it needs (a critic, start weights, a teacher) in `attach`. State that
    moves lives in buffers or parameters, so that checkpoints carry it.

    Attributes:
        required_domains: The domains that must be present in training, of "source", "target", "domains" (any two) and
            "sources" (at least two of them).
        needs_classes: Whether it works on class probabilities, that is, only in classification.
        needs_raw_input: Whether it looks at inputs, `x`; features are then not cached.
        separate_domains: Whether each domain passes through the backbone by itself, so that BatchNorm normalises it by
            its own statistics in training, and by running statistics of all domains afterwards.
        full_pass: The domains, of "source" and "target", over whose training samples it is given a pass before each
            epoch, by `on_full_pass`.
        changes_backbone: Whether `attach` changes the backbone; it then comes before that of the others.
        supported_settings: In which settings beside one labelled source and one target with the same classes it is
            sound: "several sources", "generalisation" (no target in training), "partial" (the target lacks classes),
            "open set" (the target has classes of its own), "source-free".

    Args:
        weight: What the term is multiplied by, a number or a `WeightSchedule`.
    """

    required_domains: ClassVar[tuple[str, ...]] = ()
    needs_classes: ClassVar[bool] = False
    needs_raw_input: ClassVar[bool] = False
    separate_domains: ClassVar[bool] = False
    full_pass: ClassVar[tuple[str, ...]] = ()
    changes_backbone: ClassVar[bool] = False
    supported_settings: ClassVar[tuple[str, ...]] = ("several sources",)

    def __init__(self, weight: LossWeight = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def attach(self, module: BaseTransferModule) -> None:
        """Called once, when the module has its pretrained weights and its head."""

    def transform_batch(self, module: BaseTransferModule, batch: Mapping[str, Batch]) -> Mapping[str, Batch]:
        """Returns the batch that takes the place of a training batch, by domain, e.g. one of mixed samples."""
        return batch

    def on_full_pass(self, module: BaseTransferModule, domain: str, outputs: Iterator[DomainOutput]) -> None:
        """Learns from all training samples of a domain of `full_pass`, in eval mode and without gradient.

        Args:
            module: The module.
            domain: "target", with its labelled and unlabelled samples, "source" or "source/<name>".
            outputs: Batch by batch; `index` says which samples they are of. Each process is given all of them.
        """

    def forward(
        self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None
    ) -> Tensor | None:
        """The term before its weight, a scalar; None where what it does is done elsewhere."""
        raise NotImplementedError

    def reweight(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> None:
        """Changes how much each sample's loss counts: puts another `weight` (B,) into an output.

        Called before `forward`, when `loss` and `weight` of the outputs are there. The weights of several methods
        multiply, if each multiplies what it finds.
        """

    def check(self, module: BaseTransferModule, domains: list[str]) -> None:
        """Refuses training data that lack what it needs; called when training starts.

        Raises:
            UserError: A domain is missing.
        """
        sources = [name for name in domains if name.startswith("source")]
        missing = {
            "source": not sources and "a source domain in training; give --data.source",
            "target": "target" not in domains and "a target domain in training; give --data.target",
            "domains": len(sources) + ("target" in domains) < 2
            and "two domains in training, a source and a target or two sources",
            "sources": len(sources) < 2 and "at least two source domains in training",
        }
        for need in self.required_domains:
            if missing[need]:
                what, _, advice = str(missing[need]).partition("; ")
                raise UserError(
                    f"methods: {type(self).__name__} needs {what}, but the data has only "
                    f"{' and '.join(domains)}{advice and f'; {advice}'}"
                )


def named(methods: Iterable[Any]) -> list[tuple[str, Any]]:
    """Names methods by their classes, e.g. l2sp; a second one of a class is l2sp_2."""
    seen: Counter[str] = Counter()
    found = []
    for method in methods:
        name = type(method).__name__.lower()
        seen[name] += 1
        found.append((name if seen[name] == 1 else f"{name}_{seen[name]}", method))
    return found


def sized_by_checkpoint(part: nn.Module, *names: str) -> None:
    """Lets buffers, and parameters that are still empty, take the size that they have in a checkpoint."""

    def resize(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        for name in names:
            own = getattr(module, name)
            given = torch.zeros_like(state.get(f"{prefix}{name}", own), device=own.device)
            if not isinstance(own, nn.Parameter):
                setattr(module, name, given)
            elif not own.numel():
                setattr(module, name, nn.Parameter(given))

    part.register_load_state_dict_pre_hook(resize)  # type: ignore[no-untyped-call]


def reaches(term: Tensor, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether the gradient of a scalar comes to one of the parameters that train."""
    wanted = {id(p) for p in parameters if p.requires_grad}
    nodes: list[Any] = [term.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted:
            return True
        nodes += [before for before, _ in node.next_functions]
    return False


def attach_methods(module: BaseTransferModule) -> None:
    """Lets the methods build what they need of a module; what changes the backbone comes before what copies it.

    Raises:
        UserError: A method needs classes, and the task has none.
    """
    for _, method in sorted(module.named_methods(), key=lambda named: not named[1].changes_backbone):
        if method.needs_classes and not module.is_classification:
            which, task = type(method).__name__, type(module).__name__
            raise UserError(f"methods: {which} works on class probabilities, which {task} lacks")
        method.attach(module)


def check_methods(module: BaseTransferModule, domains: Mapping[str, Any], labels: Sequence[str]) -> None:
    """Refuses training data from which the methods, or without methods anything, cannot learn.

    Args:
        module: Its methods are asked.
        domains: The training data, by domain.
        labels: Of each domain "y", or "none" where they are hidden.

    Raises:
        UserError: A method lacks a domain, or there is nothing to learn from.
    """
    methods = module.named_methods()
    for _, method in methods:
        method.check(module, list(domains))
    if set(labels) == {"none"} and not methods:
        raise UserError(
            "methods: the training data has no labels and there is no method, so there is nothing to learn from; "
            "give one, e.g. --model.methods+=SHOT, or open the labels by --data.target_labels true"
        )


def check_reach(module: BaseTransferModule, name: str, method: Method, term: Tensor) -> None:
    """Refuses a term that moves nothing, once everything is open that ever will be.

    Raises:
        UserError: Its gradient comes to no parameter of backbone or head that trains.
    """
    if name in module.reached or module.trainable != module.trainable_stages():
        return
    module.reached.add(name)
    if not reaches(term, module.network_parameters()):
        who = type(method).__name__
        raise UserError(
            f"methods: {who} would do nothing, since its term depends on the features alone and "
            f"{module.strategy_name()} keeps frozen what makes them; give it a layer to move, "
            f"--model.bottleneck 256, or take a strategy that opens stages, e.g. LastStages, or leave {who} out"
        )


def check_trains(method: Method, module: BaseTransferModule, parts: Iterable[nn.Module], what: str) -> None:
    """Refuses a method without a term that works in parts of the backbone of which none will ever train.

    Raises:
        UserError: All are closed for good.
    """
    if not any(module.will_train(part) for part in parts):
        raise UserError(
            f"methods: {type(method).__name__} works in {what}, which {module.strategy_name()} keeps frozen, so that "
            f"it would do nothing; take a strategy that opens them, e.g. Full, or leave {type(method).__name__} out"
        )


def check_head(method: Method, module: BaseTransferModule) -> None:
    """Refuses a method that keeps the source's head where the head is another one.

    Raises:
        UserError: The head starts at random.
    """
    if not module.head_transferred and module.trainer.ckpt_path is None:
        raise UserError(
            f"methods: {type(method).__name__} keeps the source's head; give the run of a source with the same classes "
            "and head by --model.backbone.weights RUN"
        )


def pairs(source: DomainOutput | None, target: DomainOutput | None) -> list[tuple[DomainOutput, DomainOutput]]:
    """The pairs of domains to bring together: source and target, or without a target each two of the sources."""
    assert source is not None
    return [(source, target)] if target is not None else list(combinations(source.split(), 2))
