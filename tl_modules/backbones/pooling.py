"""Pools the vectors of a sequence of tokens, words or frames to one vector."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from tl_modules.batch.samples import Padded

PoolingKind = Literal["mean", "attention"]


class SequencePooling(nn.Module):
    """Computes a weighted sum of the vectors of each sequence, Padded (B, L, D) -> (B, D).

    "mean" has equal weights; "attention" uses the softmax of a learnt score w h_t, as in Yang et al. (NAACL 2016)
    without their hidden layer. w starts at 0, so attention starts as the mean, and remains it while frozen.

    Args:
        kind: "mean" or "attention".
        width: D.
    """

    def __init__(self, kind: PoolingKind, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False) if kind == "attention" else None
        if self.score is not None:
            nn.init.zeros_(self.score.weight)

    def forward(self, sequences: Padded) -> Tensor:
        """Maps Padded (B, L, D) to (B, D); zeros if a sequence is empty."""
        values, inside = sequences.values, sequences.mask[..., None]
        if self.score is None:
            return (values * inside).sum(1) / inside.sum(1).clamp(min=1)
        lowest = -1e4  # not -inf: a softmax over an empty sequence would be NaN
        weights: Tensor = self.score(values).masked_fill(~inside, lowest).softmax(1) * inside
        return (weights * values).sum(1)
