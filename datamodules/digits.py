"""Two real domains without a download: scanned digits, and the same digits blended with photos."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from datamodules.base import TransferDataModule
from datamodules.errors import DataError
from datamodules.image import ArrayImages
from datamodules.splits import split_rows

SIZE = 28


class Digits(TransferDataModule):
    """scikit-learn's 1,797 handwritten digits: half are the source, the other half, on photos, the target.

    A target image is `|photo patch - digit|` per channel, as in MNIST-M (Ganin et al., JMLR 2016), with scikit-learn's
    two sample photos. The domains share no digit; a photo's left 60 %, next 20 % and last 20 % are for the training,
    validation and test split. Images are 28 x 28. The split of the target does not look at its labels.

    Args:
        target: Whether to include the target domain.
        source: Whether to include the source domain.
        **kwargs: As for `TransferDataModule`.
    """

    x_schema: Mapping[str, Any] = {"image": {}}

    def __init__(self, target: bool = True, source: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not (target or source):
            raise DataError("target: target and source cannot both be false")
        self.class_names = [str(digit) for digit in range(10)]
        self.wanted = {"source": source, "target": target}

    def domains(self, split: str) -> Mapping[str, Dataset[Any]]:
        """Returns the split's digits in each domain."""
        return {name: build()[name][split] for name, wanted in self.wanted.items() if wanted}


@cache
def build() -> dict[str, dict[str, Dataset[Any]]]:
    """Builds both domains, split; the result is the same for every seed."""
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    images = np.stack([_enlarge(image) for image in digits.images])
    photos = load_sample_images().images
    generator = np.random.default_rng(0)
    source, target = split_rows(digits.target, (0.5,), seed=0, stratified=False)
    found: dict[str, dict[str, Dataset[Any]]] = {"source": {}, "target": {}}
    for domain, rows in (("source", source), ("target", target)):
        val, test, train = split_rows(digits.target[rows], (0.16, 0.34), seed=1, stratified=domain == "source")
        for split, part in (("train", train), ("val", val), ("test", test)):
            chosen = np.asarray(rows)[part]
            x = images[chosen]
            if domain == "target":
                x = np.stack([_blend(digit, photos, split, generator) for digit in x])
            found[domain][split] = ArrayImages(x, digits.target[chosen].astype(np.int64))
    return found


def _enlarge(digit: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Resizes 8 x 8 in 0..16 to 28 x 28 uint8."""
    from PIL import Image

    image = Image.fromarray((digit * 255 / 16).astype(np.uint8))
    return np.array(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _blend(
    digit: np.ndarray[Any, Any], photos: list[np.ndarray[Any, Any]], split: str, generator: np.random.Generator
) -> np.ndarray[Any, Any]:
    """Computes |photo patch - digit| from the part of a photo that belongs to the split."""
    photo = photos[generator.integers(len(photos))]
    height, width, _ = photo.shape
    start, end = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}[split]
    left = generator.integers(int(start * width), int(end * width) - SIZE + 1)
    top = generator.integers(0, height - SIZE + 1)
    patch = photo[top : top + SIZE, left : left + SIZE].astype(np.int16)
    blended: np.ndarray[Any, Any] = np.abs(patch - digit[..., None]).astype(np.uint8)
    return blended
