"""The input layer of backbones for tables, and their base class.

x (B, D), or {"numeric": (B, D), "categorical": (B, K)} -> Standardise (-> embeddings) | one-hot categories
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tl_modules.backbones.base import Backbone, PretrainedWeights
from tl_modules.errors import UserError

Scale = Literal["each", "all"]


class Standardise(nn.BatchNorm1d):
    """Subtracts each column's mean, and divides by its standard deviation or by one number for all, (B, D) -> (B, D).

    Args:
        columns: D.
        scale: "each": a column's own standard deviation. "all": the root of the columns' mean variance.
        clip: With "each", values are clipped to this many standard deviations; a column almost constant in training may
            reach thousands in another domain. None: no clipping.
    """

    def __init__(self, columns: int, scale: Scale, clip: float | None) -> None:
        # momentum None: the average over all batches, so that columns of any scale are right from the first step
        super().__init__(columns, affine=False, momentum=None)
        self.scale, self.clip = scale, clip

    def forward(self, input: Tensor) -> Tensor:
        """Standardises (B, D)."""
        each = super().forward(input)
        if self.scale == "each":
            return each if self.clip is None else each.clamp(-self.clip, self.clip)
        if self.training or self.running_mean is None or self.running_var is None:
            mean, variance = input.mean(0), input.var(0, unbiased=False)
        else:
            mean, variance = self.running_mean, self.running_var
        return (input - mean) / (variance.mean() + self.eps).sqrt()


class MixedColumns(nn.Module):
    """Standardises numeric columns, and optionally embeds them; one-hot encodes categories, unknown ones as all 0.

    Args:
        numeric: D, the number of numeric columns.
        categories: The number of categories of each of the K others, without the unknown one.
        scale: As in `Standardise`.
        clip: As in `Standardise`.
        embedding: Width of each number's embedding by periodic functions (Gorishniy et al., NeurIPS 2022); 0: none.

    Attributes:
        out_features: Width of the output.
    """

    def __init__(
        self,
        numeric: int,
        categories: Sequence[int],
        scale: Scale = "each",
        clip: float | None = 5.0,
        embedding: int = 0,
    ) -> None:
        super().__init__()
        self.standardise = Standardise(numeric, scale, clip)
        self.embeddings = periodic(numeric, embedding) if embedding else None
        starts = torch.tensor([0, *(size + 1 for size in categories)]).cumsum(0)
        self.register_buffer("starts", starts[:-1], persistent=False)
        known = torch.ones(int(starts[-1]), dtype=torch.bool)
        known[starts[:-1]] = False
        self.register_buffer("known", known.nonzero()[:, 0], persistent=False)
        self.slots = int(starts[-1])
        self.out_features = numeric * max(1, embedding) + sum(categories)

    def forward(self, x: Any) -> Tensor:
        """Maps (B, D), or a dict with that and (B, K), to (B, out_features)."""
        numbers, codes = (x["numeric"], x.get("categorical")) if isinstance(x, Mapping) else (x, None)
        parts = [self.standardise(numbers)]
        if self.embeddings is not None:
            parts = [self.embeddings(parts[0]).flatten(1)]
        if codes is not None:
            marks = parts[0].new_zeros(len(codes), self.slots).scatter_(1, codes + self.starts, 1.0)
            parts.append(marks[:, self.known])
        return torch.cat(parts, 1)


def library(name: str, field: str) -> Any:
    """Imports a library of the extra `tables`.

    Raises:
        UserError: It is not installed; `field` is the argument that needs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"{field}: {name} is not installed: pip install 'lightning-transfer[tables]'") from error


def periodic(numeric: int, width: int) -> nn.Module:
    """Builds embeddings of numbers by sines and cosines of learnt frequencies, (B, D) -> (B, D, width)."""
    module: nn.Module = library("rtdl_num_embeddings", "embedding").PeriodicEmbeddings(numeric, width, lite=False)
    return module


class TabularBackbone(Backbone):
    """A backbone for rows of tables; a subclass implements `layers`, `forward` and `stages`."""

    decided_by_schema: tuple[str, ...] = ("scale",)
    scale: Scale | None
    in_features: int | None = None
    weights: PretrainedWeights
    strict: bool

    def bind_schema(self, x: Mapping[str, Any]) -> None:
        """Builds the layers for the data's columns.

        Raises:
            UserError: The number of columns is unknown, or differs from that of the layers.
        """
        if self.scale is None:
            self.scale = "all" if x.get("one_unit") else "each"
            for module in self.modules():
                if isinstance(module, Standardise):
                    module.scale = self.scale
        columns = len(x["numeric"]) if "numeric" in x else None
        if self.in_features is None:
            if columns is None:
                kind = type(self).__name__
                raise UserError(f"in_features: the number of columns is unknown; {kind} needs data such as TabularData")
            self.build(columns, [len(known) for _, known in sorted(x.get("categorical", {}).items())])
        elif columns not in (None, self.in_features) or x.get("categorical"):
            others = f" and {len(x['categorical'])} of categories" if x.get("categorical") else ""
            raise UserError(f"in_features: {self.in_features} for data with {columns} columns{others}")

    def build(self, numeric: int, categories: list[int]) -> None:
        """Builds the layers and loads the weights; means and deviations always come from the current run's rows."""
        self.model, self.in_features = self.layers(numeric, categories), numeric
        self.load_pretrained(self.weights, self.strict)
        for module in self.model.modules():
            if isinstance(module, Standardise) and module.num_batches_tracked is not None:
                module.num_batches_tracked.zero_()

    def layers(self, numeric: int, categories: list[int]) -> nn.Module:
        """Builds the network, with its columns; sets `out_features`.

        Args:
            numeric: Number of numeric columns.
            categories: Number of categories of each other column.
        """
        raise NotImplementedError
