"""A transformer whose tokens are the columns of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tl_modules.backbones.base import PretrainedWeights
from tl_modules.backbones.columns import Scale, Standardise, TabularBackbone, library
from tl_modules.errors import UserError

__all__ = ["FTTransformer"]


class FTTransformer(TabularBackbone):
    """FT-Transformer (Gorishniy et al., NeurIPS 2021); needs `pip install 'lightning-transfer[tables]'`.

    Each column is a token, beside a class token, whose last state is the features. The first stage holds the columns'
    embeddings and the first block; each further block is a stage. A category not seen in training starts as the zero
    vector.

    Args:
        blocks: Number of blocks, 1 to 6; sizes and dropout follow from it as in the authors' package.
        width: Width of a token, a multiple of 8; None follows from `blocks`.
        weights: A local file or a run of `tl fit`; None starts at random.
        strict: Rejects weights that lack a tensor, have one of another shape, or have further blocks.
        scale: As in `TabularMLP`.
        clip: As in `TabularMLP`.

    Raises:
        UserError: A size does not fit, the library is missing, or the weights do not fit.
    """

    model: nn.ModuleDict

    def __init__(
        self,
        blocks: int = 3,
        width: int | None = None,
        weights: PretrainedWeights = None,
        strict: bool = True,
        scale: Scale | None = None,
        clip: float | None = 5.0,
    ) -> None:
        super().__init__()
        if not 1 <= blocks <= 6 or (width is not None and (width < 8 or width % 8)):
            raise UserError(f"blocks, width: {blocks} must be in 1 to 6, and {width} a multiple of 8")
        self.blocks, self.token_width = blocks, width
        self.weights, self.strict, self.scale, self.clip = weights, strict, scale, clip

    def layers(self, numeric: int, categories: list[int]) -> nn.Module:
        """Builds embeddings and blocks."""
        kind = library("rtdl_revisiting_models", "backbone").FTTransformer
        options = kind.get_default_kwargs(self.blocks)
        options["d_block"] = self.out_features = self.token_width or options["d_block"]
        sizes = [size + 1 for size in categories]  # with the unknown one
        network = kind(n_cont_features=numeric, cat_cardinalities=sizes, d_out=None, **options)
        for embedding in network.cat_embeddings.embeddings if categories else ():
            torch.nn.init.zeros_(embedding.weight[0])
        standardise = Standardise(numeric, self.scale or "each", self.clip)
        return nn.ModuleDict({"standardise": standardise, "network": network})

    def forward(self, x: Any) -> Tensor:
        """Maps rows to (B, width)."""
        numbers, codes = (x["numeric"], x.get("categorical")) if isinstance(x, Mapping) else (x, None)
        numbers = self.model["standardise"](numbers) if numbers.shape[1] else None
        features: Tensor = self.model["network"](numbers, codes)
        return features[:, 0] if features.ndim == 3 else features

    def stages(self) -> list[nn.Module]:
        """Returns one stage per block."""
        network: Any = self.model["network"]
        parts: list[list[nn.Module]] = [[block] for block in network.backbone.blocks]
        embeddings = (network.cls_embedding, network.cont_embeddings, network.cat_embeddings)
        parts[0] = [self.model["standardise"], *(each for each in embeddings if each is not None), *parts[0]]
        return [nn.ModuleList(part) for part in parts]
