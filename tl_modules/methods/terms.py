"""The means of a training epoch's terms, summed on the device without a host sync."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor


class LossMeans:
    """Means over an epoch's samples, and the first step in which a term was not finite."""

    def __init__(self) -> None:
        # steps with the same terms are summed together; nearly always that is all of them
        self.sums: dict[tuple[str, ...], Tensor] = {}
        self.samples: dict[tuple[str, ...], int] = {}
        self.finite = torch.zeros(())

    def add(self, terms: Mapping[str, Tensor], size: int) -> None:
        """Adds one step's terms, scalars that are means over `size` samples."""
        names = tuple(terms)
        values = torch.stack([term.detach() for term in terms.values()]).float()
        if names not in self.sums:
            self.sums[names], self.samples[names] = torch.zeros_like(values), 0
            self.finite = self.finite.to(values.device)
        self.sums[names].add_(values, alpha=size)
        self.samples[names] += size
        # nan or inf in a sum stays there, so this counts the finite steps without a host sync
        self.finite += reduce(torch.add, [s.sum() for s in self.sums.values()]).isfinite()

    def means(self) -> dict[str, Tensor]:
        """Returns the epoch's mean of each term so far."""
        means = {}
        for name in dict.fromkeys(name for names in self.sums for name in names):
            having = [names for names in self.sums if name in names]
            total = torch.stack([self.sums[names][names.index(name)] for names in having]).sum()
            means[name] = total / sum(self.samples[names] for names in having)
        return means

    def first_nonfinite(self) -> tuple[int, list[str]] | None:
        """Returns how many steps precede the first non-finite one, and its non-finite terms; None if all are finite."""
        fine = {names: sums.isfinite().tolist() for names, sums in self.sums.items()}
        wrong = [name for names, each in fine.items() for name, good in zip(names, each, strict=True) if not good]
        return (int(self.finite), list(dict.fromkeys(wrong))) if wrong else None

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain data."""
        groups = [[list(names), sums.cpu(), self.samples[names]] for names, sums in self.sums.items()]
        return {"groups": groups, "finite": self.finite.cpu()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restores the state."""
        self.sums = {tuple(names): sums.to(device) for names, sums, _ in state["groups"]}
        self.samples = {tuple(names): samples for names, _, samples in state["groups"]}
        self.finite = state["finite"].to(device)
