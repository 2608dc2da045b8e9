"""The base class of methods: one weighted term of the loss.

To write a method, read the class. The module's checks follow; `check_trains` and `check_head` are for methods.
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

    A subclass implements `forward`; it may build what it needs (a critic, a copy of the weights, a teacher) in
    `attach`. State that changes belongs in buffers or parameters, so that checkpoints save it.

    Attributes:
        required_domains: The domains that must be present in training, of "source", "target", "domains" (any two) and
            "sources" (at least two of them).
        needs_classes: Whether it works on class probabilities, so only in classification.
        needs_raw_input: Whether it reads inputs, `x`; features are then not cached.
        separate_domains: Whether each domain passes through the backbone separately, so that BatchNorm normalises it by
            its own statistics in training, and by running statistics of all domains afterwards.
        full_pass: The domains, of "source" and "target", for which `on_full_pass` gets the outputs of all training
            samples before each epoch.
        changes_backbone: Whether `attach` changes the backbone; it is then called before those of other methods.
        supported_settings: The settings, beside one labelled source and one target with the same classes, in which it
            is sound: "several sources", "generalisation" (no target in training), "partial" (the target lacks classes),
            "open set" (the target has classes of its own), "source-free".

    Args:
        weight: Multiplies the term; a number or a `WeightSchedule`.
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
        """Builds what the method needs; called once, when the module has its pretrained weights and its head."""

    def transform_batch(self, module: BaseTransferModule, batch: Mapping[str, Batch]) -> Mapping[str, Batch]:
        """Returns a batch that replaces the training batch, by domain, e.g. of mixed samples."""
        return batch

    def on_full_pass(self, module: BaseTransferModule, domain: str, outputs: Iterator[DomainOutput]) -> None:
        """Learns from all training samples of a domain in `full_pass`, in eval mode and without gradient.

        Args:
            module: The module.
            domain: "target", with its labelled and unlabelled samples, "source" or "source/<name>".
            outputs: The outputs by batch; `index` identifies the samples. Each process gets all of them.
        """

    def forward(
        self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None
    ) -> Tensor | None:
        """Computes the term before its weight, a scalar; None if the method has no term."""
        raise NotImplementedError

    def reweight(self, module: BaseTransferModule, source: DomainOutput | None, target: DomainOutput | None) -> None:
        """Changes how much each sample's loss counts, by replacing the `weight` (B,) of an output.

        Called before `forward`, when `loss` and `weight` of the outputs are available. The weights of several methods
        multiply, if each multiplies the existing weight.
        """

    def check(self, module: BaseTransferModule, domains: list[str]) -> None:
        """Rejects training data that lacks a required domain; called when training starts.

        Raises:
            UserError: A domain is missing.
        """
        sources = [name for name in domains if name.startswith("source")]
        needs = {  # met, what is needed, advice
            "source": (len(sources) > 0, "a source domain in training", "; pass --data.source"),
            "target": ("target" in domains, "a target domain in training", "; pass --data.target"),
            "domains": (
                len(sources) + ("target" in domains) > 1,
                "two domains in training, a source and a target or two sources",
                "",
            ),
            "sources": (len(sources) > 1, "at least two source domains in training", ""),
        }
        for met, what, advice in map(needs.__getitem__, self.required_domains):
            if not met:
                have = " and ".join(domains)
                raise UserError(f"methods: {type(self).__name__} needs {what}, but the data has only {have}{advice}")


def named(methods: Iterable[Any]) -> list[tuple[str, Any]]:
    """Names methods by their classes, e.g. l2sp; a second one of the same class is l2sp_2."""
    seen: Counter[str] = Counter()
    found = []
    for method in methods:
        name = type(method).__name__.lower()
        seen[name] += 1
        found.append((name if seen[name] == 1 else f"{name}_{seen[name]}", method))
    return found


def sized_by_checkpoint(part: nn.Module, *names: str) -> None:
    """Resizes buffers, and parameters that are still empty, to their size in a checkpoint."""

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
    """Returns whether the gradient of a scalar reaches a trainable parameter."""
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
    """Calls `attach` of each method; methods that change the backbone come before methods that copy it.

    Raises:
        UserError: A method needs classes, and the task has none.
    """
    for _, method in sorted(module.named_methods(), key=lambda named: not named[1].changes_backbone):
        if method.needs_classes and not module.is_classification:
            which, task = type(method).__name__, type(module).__name__
            raise UserError(f"methods: {which} works on class probabilities, which {task} lacks")
        method.attach(module)


def check_methods(module: BaseTransferModule, domains: Mapping[str, Any], labels: Sequence[str]) -> None:
    """Rejects training data from which the methods, or, without methods, the task cannot learn.

    Args:
        module: The module with the methods.
        domains: The training data, by domain.
        labels: For each domain "y", or "none" if labels are hidden.

    Raises:
        UserError: A method lacks a domain, or there is nothing to learn from.
    """
    methods = module.named_methods()
    for _, method in methods:
        method.check(module, list(domains))
    if set(labels) == {"none"} and not methods:
        raise UserError(
            "methods: the training data has no labels and there is no method, so there is nothing to learn from; "
            "pass a method, e.g. --model.methods+=SHOT, or show the labels with --data.target_labels true"
        )


def check_reach(module: BaseTransferModule, name: str, method: Method, term: Tensor) -> None:
    """Rejects a term without effect, once every stage that will train is unfrozen.

    Raises:
        UserError: Its gradient reaches no trainable parameter of backbone or head.
    """
    if name in module.reached or module.trainable != module.trainable_stages():
        return
    module.reached.add(name)
    if not reaches(term, module.network_parameters()):
        who = type(method).__name__
        raise UserError(
            f"methods: {who} would have no effect, since its term depends only on features, which "
            f"{module.strategy_name()} freezes; add a trainable layer, "
            f"--model.bottleneck 256, or use a strategy that trains stages, e.g. LastStages, or leave {who} out"
        )


def check_trains(method: Method, module: BaseTransferModule, parts: Iterable[nn.Module], what: str) -> None:
    """Rejects a method without a term that works in parts of the backbone of which none will ever train.

    Raises:
        UserError: All parts are frozen for the whole run.
    """
    if not any(module.will_train(part) for part in parts):
        raise UserError(
            f"methods: {type(method).__name__} works in {what}, which {module.strategy_name()} freezes, so that "
            "it would have no effect; use a strategy that trains them, e.g. FullFineTuning, or leave "
            f"{type(method).__name__} out"
        )


def check_head(method: Method, module: BaseTransferModule) -> None:
    """Rejects a method that keeps the source's head if the head does not come from a run.

    Raises:
        UserError: The head starts at random.
    """
    if not module.head_transferred and module.trainer.ckpt_path is None:
        raise UserError(
            f"methods: {type(method).__name__} keeps the source's head; pass a run on a source with the same classes "
            "and head as --model.backbone.weights RUN"
        )


def pairs(source: DomainOutput | None, target: DomainOutput | None) -> list[tuple[DomainOutput, DomainOutput]]:
    """Returns the pairs of domains to align: source and target, or without a target every two sources."""
    assert source is not None
    return [(source, target)] if target is not None else list(combinations(source.split(), 2))
