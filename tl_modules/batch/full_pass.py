"""A pass over a domain's training samples: in eval mode, without augmentation, from the cache if there is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from tl_modules.batch.output import DomainOutput
from tl_modules.batch.protocol import BaseTransferModule


def full_pass(module: BaseTransferModule, loaders: Mapping[str, Any]) -> Iterator[DomainOutput]:
    """Yields the outputs for all samples of the loaders, which are named by domain, one loader after the other."""
    for domain, loader in loaders.items():
        yield from outputs_of(module, domain, loader)


def whole_domains(loaders: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups the loaders by domain: the labelled and the unlabelled part of a target are one domain."""
    found: dict[str, dict[str, Any]] = {}
    for name, loader in loaders.items():
        found.setdefault("target" if name == "target/labelled" else name, {})[name] = loader
    return found


def outputs_of(
    module: BaseTransferModule, domain: str, loader: Any, rows: Sequence[int] | None = None
) -> Iterator[DomainOutput]:
    """Yields the outputs for one domain's samples, batch by batch, without side effects, even on random states.

    Args:
        module: On its device, in a fit.
        domain: The name of the domain.
        loader: The loader of its training data. A loader that is not ours is read as it is.
        rows: Indices of the samples; None passes over all of them.
    """
    trainer, training = module.trainer, module.training
    ours = hasattr(loader, "plain")
    number = -(-len(rows) // (getattr(loader, "batch_size", None) or 1)) if rows is not None else None
    module.eval()
    try:
        with torch.random.fork_rng([module.device] if module.device.type == "cuda" else []):
            whole = range(len(loader.dataset)) if ours and rows is None else rows
            for batch in loader.plain(whole) if ours else islice(loader, number):  # may draw random numbers
                named = module.on_before_batch_transfer({domain: batch} if ours else batch, 0)
                named = {domain: next(iter(named.values()))}
                moved = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(named))
                with torch.no_grad(), trainer.precision_plugin.forward_context():
                    (output,) = module.forward_domains(moved).values()
                yield output
    finally:
        module.train(training)
