"""Recurrent networks over sequences: words, frames, time series.

    raw -> another backbone, or the series itself -> GRU 1 -> ... -> GRU n -> pool
           Padded (B, L, D)                          Padded (B, L, out_features)    (B, out_features)

Layers are torch's; each gets the lengths, so padding has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tl_modules.backbones.base import Backbone, PretrainedWeights
from tl_modules.backbones.pooling import PoolingKind, SequencePooling
from tl_modules.batch.samples import Padded
from tl_modules.errors import UserError

__all__ = ["RecurrentBackbone"]


class RecurrentLayer(nn.Module):
    """One layer over sequences of unequal lengths, unaffected by padding, Padded (B, L, D) -> Padded (B, L, H).

    Args:
        cell: "gru" or "lstm".
        inputs: D.
        width: H; if bidirectional, half of it per direction.
        bidirectional: Whether it also reads backwards.
        dropout: Share of its outputs that is dropped in training.
    """

    def __init__(self, cell: str, inputs: int, width: int, bidirectional: bool, dropout: float) -> None:
        super().__init__()
        kind = nn.GRU if cell == "gru" else nn.LSTM
        self.cell = kind(inputs, width // 2 if bidirectional else width, batch_first=True, bidirectional=bidirectional)
        self.dropout = nn.Dropout(dropout)

    def forward(self, sequences: Padded) -> Padded:
        """Maps Padded (B, L, D) to Padded (B, L, H)."""
        lengths = sequences.lengths.cpu().clamp(min=1)
        packed, _ = self.cell(pack_padded_sequence(sequences.values, lengths, batch_first=True, enforce_sorted=False))
        states, _ = pad_packed_sequence(packed, batch_first=True, total_length=sequences.values.shape[1])
        return sequences.replace(self.dropout(states))


class RecurrentBackbone(Backbone):
    """GRU or LSTM layers over another backbone's features of texts or sound, or over time series; one stage per layer.

    Args:
        inputs: A backbone that maps a raw sample to a sequence of vectors, e.g. WordVectors; its stages come first, and
            it determines whether the weights count as pretrained. None: samples are series, (L, D) or (L,), of any
            length.
        in_features: D of series; None takes it from the data's schema, {"series": names of the D columns}.
        width: Width of each layer's states, both directions together.
        layers: Number of layers.
        cell: "gru" or "lstm".
        bidirectional: Whether each layer also reads backwards.
        dropout: Share of each layer's outputs that is dropped in training.
        pooling: How all states are pooled to one vector: their mean, or a learnt weighted mean.
        weights: A local file or a run of `tl fit`, for everything except `inputs`; None starts at random.
        strict: Rejects weights that lack a tensor, have one of another shape, or have further blocks.

    Raises:
        UserError: A number is out of range, or the width of the series is unknown.
    """

    model: Any
    decided_by_schema = ("in_features",)

    def __init__(
        self,
        inputs: Backbone | None = None,
        in_features: int | None = None,
        width: int = 128,
        layers: int = 1,
        cell: Literal["gru", "lstm"] = "gru",
        bidirectional: bool = True,
        dropout: float = 0.0,
        pooling: PoolingKind = "mean",
        weights: PretrainedWeights = None,
        strict: bool = True,
    ) -> None:
        super().__init__()
        if layers < 1 or width < 1 or (bidirectional and width % 2):
            raise UserError(f"layers, width: {layers} and {width} must be at least 1, and width even if bidirectional")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout: {dropout} must be in [0, 1)")
        self.inputs, self.out_features, self.weights, self.strict = inputs, width, weights, strict
        self.form: dict[str, Any] = {"width": width, "bidirectional": bidirectional, "dropout": dropout}
        self.layers, self.cell, self.pooling = layers, cell, pooling
        self.in_features = in_features if inputs is None else inputs.width
        if inputs is not None:
            self.prepare = inputs.prepare
        if self.in_features is not None:
            self._build(self.in_features)

    def bind_schema(self, x: Mapping[str, Any]) -> None:
        """Builds the layers for the data's columns, or passes the schema to `inputs`.

        Raises:
            UserError: The number of columns is unknown, or differs from that of the layers.
        """
        if self.inputs is not None:
            self.inputs.bind_schema(x)
            return
        columns = len(x["series"]) if "series" in x else None
        if self.in_features is None and columns is None:
            raise UserError(
                "in_features: the number of columns of the series is unknown; pass --model.backbone.in_features D, or "
                "--model.backbone.inputs for other data, e.g. WordVectors for texts"
            )
        if self.in_features is None:
            self._build(cast(int, columns))
        elif columns not in (None, self.in_features):
            raise UserError(f"in_features: {self.in_features} for series with {columns} columns")

    def _build(self, in_features: int) -> None:
        self.in_features = in_features
        widths = [in_features, *[self.width] * (self.layers - 1)]
        layers = [RecurrentLayer(self.cell, inputs, **self.form) for inputs in widths]
        self.model = nn.ModuleDict({"layers": nn.ModuleList(layers), "pool": SequencePooling(self.pooling, self.width)})
        self.load_pretrained(self.weights, self.strict)

    def forward(self, x: Any) -> Padded:
        """Maps prepared inputs, or series (B, L, D), (B, L) or Padded, to states, Padded (B, L, width)."""
        states = x if self.inputs is None else self.inputs(x)
        if isinstance(states, Tensor):
            shape = torch.full((len(states), 1), states.shape[1], device=states.device)
            states = Padded(states, shape)
        if states.values.ndim == 2:
            states = Padded(states.values[..., None], states.shapes)
        states = states.replace(states.values.float()) if not states.values.is_floating_point() else states
        for layer in self.model["layers"]:
            states = layer(states)
        return cast(Padded, states)

    def pooled_features(self, features: Any) -> Tensor:
        """Pools states, Padded (B, L, width), to (B, width), by `pooling`."""
        pooled: Tensor = self.model["pool"](features)
        return pooled

    def stages(self) -> list[nn.Module]:
        """Returns the stages of `inputs`, and each layer; a learnt pooling belongs to the last."""
        *first, last = self.model["layers"]
        return [*(self.inputs.stages() if self.inputs else []), *first, nn.ModuleList([last, self.model["pool"]])]
