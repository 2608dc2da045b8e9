"""Domains made from one image set: rotated, coloured, corrupted.

Digits -> its samples in disjoint parts -> a Shift for each part -> "source/a", "source/b", "target"
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFilter
from torch import nn
from torch.utils.data import Dataset

from datamodules.base import TransferDataModule
from datamodules.errors import DataError, check_known
from datamodules.image import ArrayImages
from datamodules.orders import generator_of
from datamodules.splits import SPLITS, ids_of

Array = np.ndarray[Any, Any]


class Shift(nn.Module):
    """What a domain does to an image and, for some shifts, to its label.

    A subclass writes `forward`, and `class_names` if it merges classes.
    """

    def class_names(self, names: list[str] | None) -> list[str] | None:
        """Returns the new class names: K of N classes merge N / K neighbours each. None: labels are real values."""
        return names

    def forward(self, image: Array, label: Any, generator: np.random.Generator) -> tuple[Array, Any]:
        """The shifted image and label.

        Args:
            image: (C, H, W) uint8 with 1 or 3 channels.
            label: One of `class_names`, as a number, or a real value.
            generator: The source of random numbers.
        """
        raise NotImplementedError


class NoShift(Shift):
    """Leaves images as they are."""

    def forward(self, image: Array, label: Any, generator: np.random.Generator) -> tuple[Array, Any]:
        """Returns the image unchanged."""
        return image, label


class Rotation(Shift):
    """Rotates images anticlockwise about their centre; the corners that come into view are black.

    Args:
        degrees: The angle.
    """

    def __init__(self, degrees: float) -> None:
        super().__init__()
        self.degrees = degrees

    def forward(self, image: Array, label: Any, generator: np.random.Generator) -> tuple[Array, Any]:
        """Rotates with bilinear interpolation."""
        return _array(_picture(image).rotate(self.degrees, Image.Resampling.BILINEAR)), label


class SpuriousColour(Shift):
    """Spurious colour: predicts the label better than the shape does, but not in every domain (ColoredMNIST).

    Arjovsky et al., 2019. The classes become two, the lower and the upper half. A label is flipped with probability
    `label_noise`, and the colour is the resulting label flipped with probability `flip`. The image's grey values go
    into the red channel (colour 0) or the green one (colour 1).

    Args:
        flip: Probability that colour and label differ.
        label_noise: Probability that label and shape differ; 0.25 in the paper.
    """

    def __init__(self, flip: float, label_noise: float = 0.25) -> None:
        super().__init__()
        for name, value in (("flip", flip), ("label_noise", label_noise)):
            if not 0 <= value <= 1:
                raise DataError(f"{name}: {value} is not a probability; it must be in [0, 1]")
        self.flip, self.label_noise = flip, label_noise

    def class_names(self, names: list[str] | None) -> list[str] | None:
        """Returns the names of the two halves."""
        if names is None or len(names) < 2:
            raise DataError("shifts: SpuriousColour merges classes into two, but the labels are not classes")
        middle = (len(names) + 1) // 2
        return [f"{half[0]} to {half[-1]}" for half in (names[:middle], names[middle:])]

    def forward(self, image: Array, label: Any, generator: np.random.Generator) -> tuple[Array, Any]:
        """Turns (1 or 3, H, W) into (3, H, W), in red or green."""
        wrong, other = generator.random(2) < (self.label_noise, self.flip)
        label = int(label) ^ int(wrong)
        coloured = np.zeros((3, *image.shape[1:]), np.uint8)
        coloured[label ^ int(other)] = image.mean(0).round()
        return coloured, label


# ImageNet-C's five severities (Hendrycks and Dietterich, ICLR 2019); pixels refer to a side of 224
SEVERITIES = {
    "noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation, on the [0, 1] scale
    "blur": (1, 2, 3, 4, 6),  # standard deviation of the Gaussian, pixels
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # factor of the distance to the mean
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to HSV's value, on the [0, 1] scale
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # factor of the resolution
    "jpeg": (25, 18, 15, 10, 7),  # quality
}


class Corruption(Shift):
    """One of the corruptions of ImageNet-C (Hendrycks and Dietterich, ICLR 2019), with its parameters.

    Args:
        kind: Gaussian noise, Gaussian blur (scaled with the image), contrast, brightness, pixelate or jpeg.
        severity: 1 to 5.

    Raises:
        DataError: The severity does not exist.
    """

    def __init__(
        self, kind: Literal["noise", "blur", "contrast", "brightness", "pixelate", "jpeg"], severity: int = 3
    ) -> None:
        super().__init__()
        check_known("kind", kind, SEVERITIES, "corruption")
        if severity not in range(1, 6):
            raise DataError(f"severity: {severity} must be 1, 2, 3, 4 or 5")
        self.kind, self.amount = kind, SEVERITIES[kind][severity - 1]

    def forward(self, image: Array, label: Any, generator: np.random.Generator) -> tuple[Array, Any]:
        """Corrupts the image."""
        x, amount, picture = image / 255, self.amount, _picture(image)
        if self.kind == "noise":
            x = x + generator.normal(0, amount, x.shape)
        elif self.kind == "contrast":
            mean = x.mean((1, 2), keepdims=True)
            x = mean + amount * (x - mean)
        elif self.kind == "brightness":
            value = x.max(0)
            brighter = np.minimum(value + amount, 1)
            # hue and saturation stay, so the channels keep their ratios; black becomes grey
            x = np.where(value > 0, x * brighter / np.maximum(value, 1e-9), brighter)
        elif self.kind == "blur":
            return _array(picture.filter(ImageFilter.GaussianBlur(amount * min(picture.size) / 224))), label
        elif self.kind == "pixelate":
            small = (max(1, round(picture.width * amount)), max(1, round(picture.height * amount)))
            shrunk = picture.resize(small, Image.Resampling.BOX)
            return _array(shrunk.resize(picture.size, Image.Resampling.NEAREST)), label
        elif self.kind == "jpeg":
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=int(amount))
            return _array(Image.open(file)), label
        return (x.clip(0, 1) * 255).round().astype(np.uint8), label


class SyntheticDomains(TransferDataModule):
    """One image set as several domains, each with its own shift; any of them can be the target.

    RotatedMNIST (Ghifary et al., ICCV 2015), with the target unseen as in domain generalisation:

        data:
          class_path: SyntheticDomains
          init_args:
            data: {class_path: ImageArrays, init_args: {target: mnist.npz}}
            target: r75
            target_unseen: true
            shifts:
              r0: {class_path: Rotation, init_args: {degrees: 0}}
              r15: {class_path: Rotation, init_args: {degrees: 15}}
              r30: {class_path: Rotation, init_args: {degrees: 30}}
              r45: {class_path: Rotation, init_args: {degrees: 45}}
              r60: {class_path: Rotation, init_args: {degrees: 60}}
              r75: {class_path: Rotation, init_args: {degrees: 75}}

    ColoredMNIST (Arjovsky et al., 2019):

            target: minus90
            shifts:
              plus90: {class_path: SpuriousColour, init_args: {flip: 0.1}}
              plus80: {class_path: SpuriousColour, init_args: {flip: 0.2}}
              minus90: {class_path: SpuriousColour, init_args: {flip: 0.9}}

    The splits are those of `data`, made without labels if the target's are hidden; its other settings (batch size,
    shots, ...) are not used. A split's images are made when they are first needed, and stay in memory. They depend on
    the seed, the split, the domain's name and the row; a split that also serves as another one (a test split that is
    the validation split) has the same images in both.

    Args:
        data: Any datamodule of images; of two domains the target is used.
        shifts: The domains by name.
        target: The target's name; None: there is none.
        split_samples: Gives each domain a disjoint part of the samples, as DomainBed does; otherwise each has all.
        source: The name of the one source; None takes all other domains.
        seed: Seeds the splits of `data`, the parts, the shifts and shuffling; None takes the seed of `data`.
        **kwargs: As for `TransferDataModule`.

    Raises:
        DataError: A domain is unknown, the data has no images, or the shifts do not agree on the classes.
    """

    def __init__(
        self,
        data: TransferDataModule,
        shifts: dict[str, Shift],
        target: str | None = None,
        split_samples: bool = True,
        source: str | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(seed=data.seed if seed is None else seed, **kwargs)
        others = [name for name in shifts if name != target]
        if target is not None:
            check_known("target", target, shifts)
        if source is not None:
            check_known("source", source, others)
        if not shifts:
            raise DataError("shifts: name at least one domain")
        sources = others if source is None else [source]
        self.names = {"source" if len(sources) == 1 else f"source/{name}": name for name in sources}
        if target is not None:
            self.names["target"] = target
        classes = {name: shift.class_names(data.class_names) for name, shift in shifts.items()}
        first = next(iter(classes))
        for name in classes:
            if classes[name] != classes[first]:
                raise DataError(f"shifts: {first} and {name} make different classes; use shifts that agree")
        self.class_names = classes[first]
        self.data, self.shifts, self.split_samples = data, shifts, split_samples
        data.wrapped(self.seed, self.would_hide_labels(self.names))
        self.num_outputs, self.x_schema = data.num_outputs, data.x_schema
        self._made: dict[tuple[str, Dataset[Any]], ArrayImages] = {}

    def domains(self, split: str) -> Mapping[str, Dataset[Any]]:
        """Returns the split's images in each domain."""
        whole, first = self._whole(split), self._first(split)
        for name in self.names.values():
            if (name, whole) not in self._made:
                self._made[name, whole] = self._make(name, whole, first)
        return {role: self._made[name, whole] for role, name in self.names.items()}

    def wrapped(self, seed: int, blind: bool) -> None:
        """Passes both on to `data`."""
        super().wrapped(seed, blind)
        self.data.wrapped(seed, blind or self.would_hide_labels(self.names))

    def _first(self, split: str) -> str:
        """Returns the first split with the same samples, whose name seeds the images."""
        for other in SPLITS[: SPLITS.index(split)]:
            with contextlib.suppress(DataError):  # the split does not exist
                if self._whole(other) is self._whole(split):
                    return other
        return split

    def _whole(self, split: str) -> Dataset[Any]:
        found = self.data.split_domains(split)
        return found.get("target", next(iter(found.values())))

    def _make(self, name: str, whole: Dataset[Any], split: str) -> ArrayImages:
        count: int = len(whole)  # type: ignore[arg-type]
        rows = np.arange(count)
        if self.split_samples:
            order = generator_of(self.seed, split).permutation(count)
            rows = np.sort(order[list(self.shifts).index(name) :: len(self.shifts)])
        if not len(rows):
            raise DataError(f"shifts: {count} {split} samples are too few for {len(self.shifts)} domains")
        old, new = len(self.data.class_names or []), len(self.class_names or [])
        images, labels = [], []
        for row in rows.tolist():
            x, y = whole[row]
            generator = generator_of(self.seed, split, name, row)
            label = y if self.class_names is None else int(y) * new // old
            image, label = self.shifts[name](_pixels(x, self.data), label, generator)
            images.append(image)
            labels.append(label)
        ids = ids_of(whole)
        made = ArrayImages(np.stack(images).transpose(0, 2, 3, 1), np.asarray(labels), [ids[row] for row in rows])
        made.unlabelled = getattr(whole, "unlabelled", "")
        return made


def _pixels(x: Any, data: TransferDataModule) -> Array:
    """Converts an image of any datamodule to (C, H, W) uint8."""
    pixels = np.asarray(x)
    if pixels.ndim != 3 or len(pixels) not in (1, 3):
        raise DataError(f"data: {type(data).__name__} gives shape {pixels.shape}, not an image with 1 or 3 channels")
    return pixels if pixels.dtype == np.uint8 else (pixels * 255).round().astype(np.uint8)


def _picture(image: Array) -> Image.Image:
    return Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def _array(picture: Image.Image) -> Array:
    pixels = np.array(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
