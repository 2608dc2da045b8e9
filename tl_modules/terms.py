"""The loss terms of a running epoch, summed on the device: no host sync in a step, and exact over a resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Terms:
    """Means over an epoch's samples, and the first step at which a term was not finite."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums = torch.zeros(0)
        self.samples = 0
        self.finite = torch.zeros(())

    def add(self, terms: Mapping[str, Tensor], size: int) -> None:
        """Takes in one step's terms, scalars that are means over `size` samples."""
        values = torch.stack([term.detach().float() for term in terms.values()])
        if not self.names:
            self.names, self.sums = list(terms), torch.zeros_like(values)
            self.finite = torch.zeros((), device=values.device)
        self.sums += values * size
        self.samples += size
        self.finite += self.sums.isfinite().all()  # a sum that was once not finite never is again

    def means(self) -> dict[str, Tensor]:
        """The epoch's mean of each term so far."""
        return dict(zip(self.names, self.sums / self.samples, strict=True)) if self.names else {}

    def bad(self) -> tuple[int, list[str]] | None:
        """How many steps were finite before the first that was not, and which terms were not; None if all were."""
        good = self.sums.isfinite().tolist()
        if all(good):
            return None
        return int(self.finite), [name for name, fine in zip(self.names, good, strict=True) if not fine]

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"names": self.names, "sums": self.sums.cpu(), "samples": self.samples, "finite": self.finite.cpu()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Goes on where `state` was taken."""
        self.names, self.samples = list(state["names"]), int(state["samples"])
        self.sums, self.finite = state["sums"].to(device), state["finite"].to(device)
