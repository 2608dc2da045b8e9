"""The means of a training epoch's terms, summed on the device without a host sync."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor


class LossMeans:
    """Means over an epoch's samples, and the first step at which a term was not finite."""

    def __init__(self) -> None:
        # steps that have the same terms are summed together; nearly always that is all of them
        self.sums: dict[tuple[str, ...], Tensor] = {}
        self.samples: dict[tuple[str, ...], int] = {}
        self.finite = torch.zeros(())

    def add(self, terms: Mapping[str, Tensor], size: int) -> None:
        """Takes in one step's terms, scalars that are means over `size` samples."""
        names = tuple(terms)
        values = torch.stack([term.detach() for term in terms.values()]).float()
        if names not in self.sums:
            self.sums[names], self.samples[names] = torch.zeros_like(values), 0
            self.finite = self.finite.to(values.device)
        self.sums[names].add_(values, alpha=size)
        self.samples[names] += size
        # a sum that was once not finite never is again, and nothing times 0 is 0 then
        self.finite += reduce(torch.add, [s.sum() for s in self.sums.values()]) * 0 == 0

    def means(self) -> dict[str, Tensor]:
        """The epoch's mean of each term so far."""
        means = {}
        for name in dict.fromkeys(name for names in self.sums for name in names):
            having = [names for names in self.sums if name in names]
            total = torch.stack([self.sums[names][names.index(name)] for names in having]).sum()
            means[name] = total / sum(self.samples[names] for names in having)
        return means

    def first_nonfinite(self) -> tuple[int, list[str]] | None:
        """How many steps were finite before the first that was not, and which terms were not; None if all were."""
        fine = {names: sums.isfinite().tolist() for names, sums in self.sums.items()}
        wrong = [name for names, each in fine.items() for name, good in zip(names, each, strict=True) if not good]
        return (int(self.finite), list(dict.fromkeys(wrong))) if wrong else None

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        groups = [[list(names), sums.cpu(), self.samples[names]] for names, sums in self.sums.items()]
        return {"groups": groups, "finite": self.finite.cpu()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Goes on where `state` was taken."""
        self.sums = {tuple(names): sums.to(device) for names, sums, _ in state["groups"]}
        self.samples = {tuple(names): samples for names, _, samples in state["groups"]}
        self.finite = state["finite"].to(device)
