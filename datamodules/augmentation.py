"""Named augmentations of training images, each a list of torchvision's transforms."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from datamodules.errors import DataError

Augmentation = Literal["auto", "none", "light", "strong"]


def transforms_of(augment: list[nn.Module] | str | None, dataset: Any, data: str) -> nn.Module | None:
    """Returns what a training image goes through; None where it is left as it is.

        none     nothing
        light    a random part, of 50 to 100 % of the area and an aspect of 3:4 to 4:3, scaled to the size; a horizontal
                 flip
        strong   a part of 25 to 100 %, a flip, TrivialAugment (Mueller and Hutter, ICCV 2021), random erasing (Zhong et
                 al., AAAI 2020)

    Args:
        augment: The name, or the transforms themselves in their order.
        dataset: The named ones end with the size of its first image.
        data: What messages call it.

    Raises:
        DataError: A named one is asked for what is no image.
    """
    if augment is None or augment == "none":
        return None
    if isinstance(augment, list):
        return nn.Sequential(*augment) if augment else None
    like = dataset[0][0]
    if not isinstance(like, Tensor) or like.ndim != 3 or len(like) not in (1, 3):
        raise DataError(
            f"augment: {augment} is for images, (1 or 3, H, W) tensors, which {data} does not give; "
            "pass a list of transforms, or none"
        )
    from torchvision.transforms import v2

    size = tuple(like.shape[-2:])
    if augment == "light":
        return nn.Sequential(v2.RandomResizedCrop(size, scale=(0.5, 1.0)), v2.RandomHorizontalFlip())
    crop = v2.RandomResizedCrop(size, scale=(0.25, 1.0))
    return nn.Sequential(crop, v2.RandomHorizontalFlip(), v2.TrivialAugmentWide(), v2.RandomErasing(0.25))
