"""Named augmentations of training images, each a list of torchvision transforms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from datamodules.errors import DataError

Augmentation = Literal["auto", "none", "light", "strong", "views"]


def transforms_of(
    augment: list[nn.Module] | str | None, dataset: Any, data: str, photos: bool = True
) -> nn.Module | None:
    """Returns the transform of a training image; None if it is left as it is.

        none     nothing
        light    a random crop of 50 to 100 % of the area, aspect 3:4 to 4:3, resized to the size; a horizontal flip
        strong   a crop of 25 to 100 %, a flip, TrivialAugment (Mueller and Hutter, ICCV 2021), random erasing (Zhong
                 et al., AAAI 2020)
        views    for pretraining, as MoCo v2 (Chen et al., 2020): a crop of 20 to 100 %, a flip, colour jitter,
                 greyscale, from 64 px on blur; for images that are not photos, and whose meaning a flip may change, a
                 crop of 50 to 100 %, rotation, translation, shear, scale, and for coloured ones brightness and contrast

    Args:
        augment: The name, or a list of transforms in their order.
        dataset: The training data; named augmentations end with the size of its first image.
        data: The data's name for messages.
        photos: Whether the images are photos.

    Raises:
        DataError: A named augmentation is asked for, but x is not an image.
    """
    if augment is None or augment == "none":
        return None
    if isinstance(augment, list):
        return nn.Sequential(*augment) if augment else None
    inputs = (dataset[row][0] for row in range(len(dataset)))  # with several inputs: the image, which a row may lack
    images = (x.get("image", x) if isinstance(x, Mapping) else x for x in inputs)
    like = next((image for image in images if image is not None), None)
    if not isinstance(like, Tensor) or like.ndim != 3 or len(like) not in (1, 3):
        raise DataError(
            f"augment: {augment} is for images, (1 or 3, H, W) tensors, which {data} does not give; "
            "pass a list of transforms, or none"
        )
    from torchvision.transforms import v2

    size = tuple(like.shape[-2:])
    if augment == "light":
        return nn.Sequential(v2.RandomResizedCrop(size, scale=(0.5, 1.0)), v2.RandomHorizontalFlip())
    if augment == "views":
        return nn.Sequential(*_views(size, len(like), photos))
    crop = v2.RandomResizedCrop(size, scale=(0.25, 1.0))
    return nn.Sequential(crop, v2.RandomHorizontalFlip(), v2.TrivialAugmentWide(), v2.RandomErasing(0.25))


def _views(size: tuple[int, ...], channels: int, photos: bool) -> list[nn.Module]:
    from torchvision.transforms import v2

    if not photos:
        affine = v2.RandomAffine(15, translate=(0.1, 0.1), scale=(0.8, 1.2), shear=10)
        colour = [v2.ColorJitter(0.4, 0.4)] if channels == 3 else []
        return [affine, v2.RandomResizedCrop(size, scale=(0.5, 1.0)), *colour]
    colour = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    crop = v2.RandomResizedCrop(size, scale=(0.2, 1.0))
    blur = [v2.RandomApply([v2.GaussianBlur(min(size) // 20 * 2 + 1, (0.1, 2.0))], 0.5)] if min(size) >= 64 else []
    return [crop, v2.RandomHorizontalFlip(), colour, v2.RandomGrayscale(0.2), *blur]
