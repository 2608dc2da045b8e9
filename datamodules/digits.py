"""Two real domains with no download: scanned digits, and the same task on photographs."""

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
    """scikit-learn's 1,797 handwritten digits: half of them the source, half on photographs the target.

    A target image is `|photo patch - digit|` per channel, as MNIST-M was made (Ganin et al., JMLR 2016), from
    scikit-learn's two sample photos. The domains share no digit, and a photo's left 60 %, next 20 % and last 20 % serve
    the training, validation and test split. Images are 28 x 28. No label of the target decides where its digit goes.

    Args:
        target: Whether the target domain is there.
        source: Whether the source domain is there.
        **kwargs: As for `TransferDataModule`.
    """

    x_schema: Mapping[str, Any] = {"image": {}}

    def __init__(self, target: bool = True, source: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not (target or source):
            raise DataError("target: with source false, target must be true")
        self.class_names = [str(digit) for digit in range(10)]
        self.wanted = {"source": source, "target": target}

    def domains(self, split: str) -> Mapping[str, Dataset[Any]]:
        """The split's digits in each domain."""
        return {name: build()[name][split] for name, wanted in self.wanted.items() if wanted}


@cache
def build() -> dict[str, dict[str, Dataset[Any]]]:
    """Both domains, split; the same in every call, whatever the run's seed."""
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
    """8 x 8 in 0..16 -> 28 x 28 uint8."""
    from PIL import Image

    image = Image.fromarray((digit * 255 / 16).astype(np.uint8))
    return np.array(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _blend(
    digit: np.ndarray[Any, Any], photos: list[np.ndarray[Any, Any]], split: str, generator: np.random.Generator
) -> np.ndarray[Any, Any]:
    """|photo patch - digit| from the part of a photo that belongs to the split."""
    photo = photos[generator.integers(len(photos))]
    height, width, _ = photo.shape
    start, end = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}[split]
    left = generator.integers(int(start * width), int(end * width) - SIZE + 1)
    top = generator.integers(0, height - SIZE + 1)
    patch = photo[top : top + SIZE, left : left + SIZE].astype(np.int16)
    blended: np.ndarray[Any, Any] = np.abs(patch - digit[..., None]).astype(np.uint8)
    return blended
