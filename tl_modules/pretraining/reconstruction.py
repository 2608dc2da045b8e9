"""Pretraining by reconstructing inputs from features of a corrupted copy."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tl_modules.backbones.base import Backbone
from tl_modules.backbones.columns import Standardise
from tl_modules.backbones.vision import ImageBackbone
from tl_modules.batch.output import full_precision
from tl_modules.errors import UserError
from tl_modules.pretraining.base import Pretraining, input_kind
from tl_modules.pretraining.layers import projector, upsampler

__all__ = ["Autoencoder"]


class Autoencoder(Pretraining):
    """Reconstructs an input from the features of a corrupted copy (Vincent et al., JMLR 2010; He et al., CVPR 2022).

        image, convolutions   Gaussian noise on all pixels
        image, transformer    patches are blanked, and only they are compared, as in masked autoencoders
        row of numbers        values are replaced by those of other rows in the same column

    `mean (decoder(features(corrupted x)) - x)^2`, for images normalised as in the backbone, for rows standardised by
    column. The decoder gets the pooled features, as the next run will; transposed convolutions turn them into an image.

    Args:
        backbone: Maps raw samples to features.
        noise: Standard deviation of the noise, on the [0, 1] scale.
        masked: Share of the patches that are blanked, or of the values that are replaced. None is 0.5 for transformers,
            0.3 for rows, otherwise 0.
        patch: Side of a patch in pixels.
        image_size: Side of the reconstruction, in pixels; larger images are compared at this size.
        width: Channels of the decoder's second to last layer; for rows half the width of its hidden layer.
        **kwargs: As for `Pretraining`.
    """

    def __init__(
        self,
        backbone: Backbone,
        noise: float = 0.3,
        masked: float | None = None,
        patch: int = 4,
        image_size: int = 28,
        width: int = 32,
        **kwargs: Any,
    ) -> None:
        def head(features: int) -> nn.Module:
            if isinstance(backbone, ImageBackbone):
                return upsampler(features, len(backbone.mean), image_size, width)
            columns = getattr(backbone, "in_features", None) or len(self.schema["x"].get("numeric", ()))
            return projector([features, 2 * width, columns])

        super().__init__(backbone, head=head, **kwargs)
        self.kind = input_kind(self.backbone, self.schema)
        if (self.schema.get("x") or {}).get("categorical"):
            raise UserError(
                "model: Autoencoder reconstructs numbers, but the data has categories; use SCARF, or drop them"
            )
        attends = any("Attention" in type(module).__name__ for module in self.backbone.modules())
        usual = 0.3 if self.kind == "numeric" else 0.5 if attends else 0.0
        self.masked = usual if masked is None else masked
        if noise < 0 or not 0 <= self.masked < 1:
            raise UserError(f"noise, masked: {noise} must be at least 0, and {self.masked} in [0, 1)")
        self.noise, self.patch, self.image_size = 0.0 if self.masked else noise, patch, image_size
        if self.kind == "numeric":
            self.scale = Standardise(cast(Any, self.head)[-1].out_features, "each", 5.0)

    def objective(self, *views: Any) -> dict[str, Tensor]:
        """Computes the squared error, over the masked part if something was masked."""
        (x,) = views
        destroyed, target, mask = self.destroy(x)
        (restored,) = self.project([destroyed])
        with full_precision(self.device):
            errors = (restored - target).square()
            return {"error": errors.mean() if mask is None else (errors * mask).sum() / mask.expand_as(errors).sum()}

    def destroy(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the corrupted input, the target, and a mask (B, 1, H, W) of the corrupted part; None: everywhere."""
        if self.kind == "numeric":
            return swap(x, self.masked)[0], self.scale(x), None
        backbone = cast(ImageBackbone, self.backbone)
        images = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        images = images.expand(-1, len(backbone.mean), -1, -1)
        target = self._at_size(backbone.preprocess(images))
        if not self.masked:
            return images + self.noise * torch.randn_like(images[:, :1]), target, None
        height, width = (-(-side // self.patch) for side in images.shape[-2:])
        hidden = (torch.rand(len(images), 1, height, width, device=x.device) < self.masked).float()
        hidden = hidden.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
        hidden = hidden[..., : images.shape[-2], : images.shape[-1]]
        return images + hidden * (backbone.mean - images), target, self._at_size(hidden)

    def _at_size(self, images: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        if images.shape[-2:] == size:
            return images
        return F.interpolate(images, size, mode="bilinear", antialias=True)

    @torch.no_grad()
    def on_validation_epoch_end(self) -> None:
        """Also draws some corrupted inputs and their reconstructions."""
        super().on_validation_epoch_end()
        loader = self.trainer.val_dataloaders
        loader = loader[0] if isinstance(loader, list) else loader
        dataset = getattr(loader, "dataset", None)
        if self.kind != "image" or not self.loggers or dataset is None or self.trainer.sanity_checking:
            return
        x = torch.stack([dataset[row][0] for row in range(min(8, len(dataset)))]).to(self.device)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            destroyed, _, _ = self.destroy(x)
        (restored,) = self.project([destroyed])
        backbone = cast(ImageBackbone, self.backbone)
        restored = restored * backbone.std + backbone.mean
        self.show("restored: destroyed above", torch.cat([self._at_size(destroyed), restored]))


def swap(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Replaces values by those of other rows of the batch in the same column.

    Args:
        x: Rows (B, D).
        share: Probability that a value is replaced.

    Returns:
        The rows, and a mask of the replaced values, (B, D).
    """
    replaced = torch.rand(x.shape, device=x.device) < share
    other = torch.rand(x.shape, device=x.device).argsort(0)  # a permutation of each column
    return torch.where(replaced, x.gather(0, other), x), replaced
