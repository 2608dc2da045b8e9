"""Image files become tensors, or are refused."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.errors import DataError
from datamodules.splits import content_hash, log

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")


def read_image(path: Path, size: int, max_pixels: int) -> Tensor:
    """Decodes, turns upright by EXIF, scales the short side to `size` and crops the centre.

    Args:
        path: The image.
        size: Side of the result in pixels.
        max_pixels: Refuse larger images by their header, before decoding.

    Returns:
        (3, size, size) uint8.

    Raises:
        DataError: It is no image, truncated, too large, or in colours that have no exact RGB (CMYK, 16 bits, ...).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image = Image.open(path)
        with image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(f"{path}: {width} x {height} pixels are more than max_pixels {max_pixels}")
            if image.mode not in _MODES:
                raise DataError(f"{path}: its {image.mode} colours have no exact RGB; convert it first")
            image.draft("RGB", (size, size))  # a JPEG is decoded at a reduced scale that still covers the size
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: it has more pixels than max_pixels {max_pixels}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: it cannot be decoded as an image ({str(error).splitlines()[0]})") from error
    scale = size / min(upright.size)
    shape = (max(size, round(upright.width * scale)), max(size, round(upright.height * scale)))
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    resized = upright.resize(shape, Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


class FolderImages(Dataset[Any]):
    """Images of one split, by path.

    Attributes:
        ids: The paths.
        targets: The class numbers.
    """

    def __init__(
        self, paths: Sequence[Path], targets: Sequence[int], size: int, max_pixels: int, keep: bool = False
    ) -> None:
        self.ids = [str(path) for path in paths]
        self.targets = np.asarray(targets, dtype=np.int64)
        self.size, self.max_pixels = size, max_pixels
        self.kept = _Kept(len(paths), size) if keep else None

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """What names its contents: a file's size, and when its contents, and when its entry, last changed."""
        try:
            stats = [os.stat(path) for path in self.ids]
        except OSError as error:
            raise DataError(f"{error.filename}: it cannot be read any more ({error.strerror})") from error
        files = [(path, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in zip(self.ids, stats, strict=True)]
        return content_hash(files, self.targets, self.size, self.max_pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.kept.get(index) if self.kept else None
        if image is None:
            try:
                image = read_image(Path(self.ids[index]), self.size, self.max_pixels)
            except DataError as error:
                raise DataError(f"{error}; mend or remove it, or pass --data.on_bad_image skip") from error
            if self.kept:
                self.kept.put(index, image)
        return image, int(self.targets[index])

    def without_bad(self, field: str) -> FolderImages:
        """The same without the images that cannot be read, and a line that counts them."""

        def readable(path: str) -> bool:
            try:
                read_image(Path(path), 32, self.max_pixels)
            except DataError as error:
                log.warning("skipped: %s", error)
                return False
            return True

        with ThreadPoolExecutor() as pool:
            good = list(pool.map(readable, self.ids))
        if not any(good):
            raise DataError(f"{field}: none of its {len(good)} images can be read")
        if not all(good):
            log.warning("%s: skipped %d of %d images", field, good.count(False), len(good))
        rows = np.flatnonzero(good)
        paths = [Path(self.ids[i]) for i in rows]
        return FolderImages(paths, self.targets[rows].tolist(), self.size, self.max_pixels, self.kept is not None)


class _Kept:
    """Decoded images in a file that has no name any more; forked workers share it through memory."""

    def __init__(self, count: int, size: int) -> None:
        handle, name = tempfile.mkstemp()
        os.close(handle)
        each = 3 * size * size
        mapped: Tensor = torch.from_file(name, shared=True, size=count * (each + 1), dtype=torch.uint8)
        os.unlink(name)
        self.pixels, self.there = mapped[: count * each].view(count, 3, size, size), mapped[count * each :]

    def get(self, index: int) -> Tensor | None:
        return self.pixels[index].clone() if self.there[index] else None

    def put(self, index: int, image: Tensor) -> None:
        self.pixels[index] = image
        self.there[index] = 1
