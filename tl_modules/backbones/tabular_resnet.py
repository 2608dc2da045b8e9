"""A residual network for rows of tables."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tl_modules.backbones.base import PretrainedWeights
from tl_modules.backbones.columns import MixedColumns, Scale, TabularBackbone, library
from tl_modules.errors import UserError

__all__ = ["TabularResNet"]


class TabularResNet(TabularBackbone):
    """ResNet for tables (Gorishniy et al., NeurIPS 2021): x + block(x); `pip install 'lightning-transfer[tables]'`.

    The first stage holds the columns, their projection and the first block; each further block is a stage.

    Args:
        blocks: Number of blocks.
        width: Width of x.
        hidden: Width within a block, as a multiple of `width`.
        dropout: Share of the hidden values that is dropped in training.
        embedding: Width of each number's embedding by periodic functions, see `MixedColumns`; 0: none.
        weights: A local file or a run of `tl fit`; None starts at random.
        strict: Rejects weights that lack a tensor, have one of another shape, or have further blocks.
        scale: As in `TabularMLP`.
        clip: As in `TabularMLP`.

    Raises:
        UserError: A size is not positive, the library is missing, or the weights do not fit.
    """

    model: nn.ModuleDict

    def __init__(
        self,
        blocks: int = 2,
        width: int = 192,
        hidden: float = 2.0,
        dropout: float = 0.15,
        embedding: int = 0,
        weights: PretrainedWeights = None,
        strict: bool = True,
        scale: Scale | None = None,
        clip: float | None = 5.0,
    ) -> None:
        super().__init__()
        if min(blocks, width, width * hidden) < 1 or embedding < 0:
            raise UserError(f"blocks, width, hidden: {blocks}, {width} and {hidden:g} times it must be at least 1 each")
        self.blocks, self.hidden, self.dropout, self.embedding = blocks, hidden, dropout, embedding
        self.out_features: int = width
        self.weights, self.strict, self.scale, self.clip = weights, strict, scale, clip

    def layers(self, numeric: int, categories: list[int]) -> nn.Module:
        """Builds columns and blocks."""
        columns = MixedColumns(numeric, categories, self.scale or "each", self.clip, self.embedding)
        network = library("rtdl_revisiting_models", "backbone").ResNet(
            d_in=columns.out_features,
            d_out=None,
            n_blocks=self.blocks,
            d_block=self.out_features,
            d_hidden_multiplier=self.hidden,
            dropout1=self.dropout,
            dropout2=0.0,
        )
        norm = nn.Sequential(nn.BatchNorm1d(self.out_features), nn.ReLU())
        return nn.ModuleDict({"columns": columns, "network": network, "output": norm})

    def forward(self, x: Any) -> Tensor:
        """Maps rows to (B, width)."""
        features: Tensor = self.model["output"](self.model["network"](self.model["columns"](x)))
        return features

    def stages(self) -> list[nn.Module]:
        """Returns one stage per block."""
        network: Any = self.model["network"]
        parts = [[block] for block in network.blocks]
        parts[0] = [self.model["columns"], network.input_projection, *parts[0]]
        parts[-1].append(self.model["output"])
        return [nn.ModuleList(part) for part in parts]
