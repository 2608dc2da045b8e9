"""Decodes image files to tensors, or rejects them.

    evaluation   decode -> resize the short side to `resize` -> crop the centre to `size`
    training     decode -> augment at the image's own size -> `fit`: the same two steps unless the size already matches

`ImageFolders.resolve` decides on the sizes: those of the pretrained weights, otherwise 224.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from datamodules.errors import DataError
from datamodules.files import FileSamples
from datamodules.near_copies import SIDE

_FORMATS = {"AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA"}
_FORMATS |= {"TIFF", "WEBP"}
_HEIC = (".heic", ".heif", ".hif")
_ORIENTATION = 0x0112  # the EXIF tag of the camera's orientation
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LONGEST = 4  # in short sides: of a longer strip only the middle is resized, which contains the crop


def image_extensions() -> tuple[str, ...]:
    """Returns the file extensions of images that the installed Pillow reads, in lower case, and those of HEIC."""
    known = Image.registered_extensions().items()
    return (*_HEIC, *(ending for ending, format in known if format in _FORMATS and format in Image.OPEN))


@dataclass(frozen=True)
class ImageReader:
    """Reads images for evaluation, and for training transforms.

    Args:
        size: Side of the result in pixels.
        resize: Length of the short side before the centre is cropped, at least `size`.
        interpolation: "bilinear" or "bicubic".
        max_pixels: Rejects larger images by their header, before decoding.
        background: The colour behind transparent pixels.
    """

    size: int
    resize: int
    interpolation: str
    max_pixels: int
    background: str = "white"

    def decode(self, path: Path) -> Image.Image:
        """Decodes an image, upright by EXIF; a JPEG at a reduced scale if that still covers `resize`.

        Grey, palette and CMYK images become RGB; of 16 bits the upper 8 are kept; transparent pixels show `background`;
        of an animation or a multi-page file the first frame is read.

        Returns:
            An RGB image.

        Raises:
            DataError: It is not an image, is truncated or too large, its values have no known range (32 bits, float),
                or it is HEIC without pillow-heif.
        """
        if path.suffix.lower() in _HEIC and not _reads_heic():
            raise DataError(f"{path}: HEIC needs pillow-heif: pip install 'lightning-transfer[heic]'")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
                image = _open(path)
            with image:
                width, height = image.size
                if width * height > self.max_pixels:
                    raise DataError(f"{path}: {width} x {height} pixels are more than max_pixels {self.max_pixels}")
                image.draft("RGB", (self.resize, self.resize))
                image.load()
                return _upright(_rgb(image, self.background, path), image)
        except (DataError, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise DataError(f"{path}: it has more pixels than max_pixels {self.max_pixels}") from error
        except Exception as error:  # Pillow's plugins raise anything on broken files
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"{path}: it cannot be decoded as an image ({reason})") from error

    def scaled(self, image: Image.Image) -> Image.Image:
        """Resizes the short side to `resize`; of a strip only the middle."""
        longest = _LONGEST * min(image.size)
        if max(image.size) > longest:
            image = middle(image, min(image.width, longest), min(image.height, longest))
        scale = self.resize / min(image.size)
        shape = (max(self.resize, round(image.width * scale)), max(self.resize, round(image.height * scale)))
        return image.resize(shape, Image.Resampling[self.interpolation.upper()])

    def read(self, path: Path) -> Tensor:
        """Reads an image for evaluation: resized and centre-cropped, (3, size, size) uint8."""
        return pixels(middle(self.scaled(self.decode(path)), self.size, self.size)).contiguous()

    def fit(self, x: Any) -> Any:
        """Brings a transformed image to evaluation's size: unchanged if it has it, otherwise resized and cropped."""
        if x.shape[-2:] == (self.size, self.size):
            return x.contiguous()
        from torchvision.transforms.v2 import functional

        height, width = x.shape[-2:]
        longest = _LONGEST * min(height, width)
        if max(height, width) > longest:
            x = functional.center_crop(x, [min(height, longest), min(width, longest)])
        scaled = functional.resize(x, [self.resize], functional.InterpolationMode(self.interpolation))
        return functional.center_crop(scaled, [self.size]).contiguous()


@cache
def _reads_heic() -> bool:
    """Registers the reader of HEIC, which takes a tenth of a second to import; returns whether it is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _open(path: Path) -> Image.Image:
    """Opens an image; one that Pillow does not know may be HEIC under another name."""
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        if not _reads_heic():
            raise
        return Image.open(path)


def _rgb(image: Image.Image, background: str, path: Path) -> Image.Image:
    """Converts an image of any mode to RGB."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # these have 16 bits
        return Image.fromarray((np.asarray(image) // 256).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(f"{path}: its {image.mode} numbers have no known range; convert it to 8 or 16 bits first")
    if not image.has_transparency_data:
        return image.convert("RGB")
    plain = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(plain, image.convert("RGBA")).convert("RGB")


def _upright(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """Turns the pixels of an image as its EXIF says; other tags, which may be malformed, are not read."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # unreadable EXIF is ignored
        turn = None
    return pixels if turn is None else pixels.transpose(turn)


def middle(image: Image.Image, width: int, height: int) -> Image.Image:
    """Crops the centre."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def pixels(image: Image.Image) -> Tensor:
    """Returns an RGB image as (3, H, W) uint8 in channels-last memory, which resizes fastest."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class FolderImages(FileSamples):
    """Images of one split, by path.

    Attributes:
        ids: The paths.
        targets: The class numbers.
    """

    what = "images"
    skip = "on_bad_image"
    reader: ImageReader

    def __init__(
        self, paths: Sequence[Path | str], targets: Sequence[int], reader: ImageReader, keep: bool = False
    ) -> None:
        super().__init__(paths, np.asarray(targets, dtype=np.int64), reader)
        self.kept = _Kept(len(paths), reader) if keep else None

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, target = Path(self.ids[index]), int(self.targets[index])
        with self.with_advice():
            return (self.kept.middle(index, path) if self.kept else self.reader.read(path)), target

    def augmented(self, index: int, transform: Callable[[Tensor], Any]) -> tuple[Any, int]:
        """Returns the sample with `transform` applied to the decoded image, (3, H, W) uint8 at its own size.

        The short side is at least evaluation's `resize`, unless the file is smaller; with `keep` it is scaled to
        `resize`. A result of another size than evaluation's is resized and cropped as in evaluation.
        """
        path = Path(self.ids[index])
        with self.with_advice():
            image = self.kept.whole(index, path).clone() if self.kept else pixels(self.reader.decode(path))
        return self.reader.fit(transform(image)), int(self.targets[index])

    def check(self, path: Path) -> None:
        """Decodes the file, a JPEG at a small scale."""
        replace(self.reader, resize=32).decode(path)

    def thumbnail(self, path: str) -> np.ndarray[Any, Any]:
        """Returns a small version of a file, stretched to (SIDE, SIDE, 3) uint8."""
        image = replace(self.reader, resize=4 * SIDE).decode(Path(path))  # a JPEG at a reduced scale
        return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))

    def taken(self, rows: Sequence[int]) -> FolderImages:
        """Returns the images of these rows."""
        paths = [Path(self.ids[i]) for i in rows]
        return FolderImages(paths, self.targets[list(rows)].tolist(), self.reader, self.kept is not None)


class _Kept:
    """Resized images in an unlinked, memory-mapped temporary file, shared by the workers.

    Each image has a slot of twice its short side squared; of a longer one the middle is kept. Unfilled parts of a slot
    take no memory or disk space.
    """

    def __init__(self, count: int, reader: ImageReader) -> None:
        self.reader, self.longest = reader, 2 * reader.resize
        self.slots = _in_file(count * 3 * reader.resize * self.longest, torch.uint8).view(count, -1)
        self.shapes = _in_file(count, torch.int64)  # height and width in one number, so that a write is atomic

    def whole(self, index: int, path: Path) -> Tensor:
        """Returns the resized image, (3, H, W)."""
        height, width = divmod(int(self.shapes[index]), 2**16)
        if not height:
            scaled = self.reader.scaled(self.reader.decode(path))
            image = pixels(middle(scaled, min(scaled.width, self.longest), min(scaled.height, self.longest)))
            height, width = image.shape[1:]
            self.slots[index, : image.numel()] = image.permute(1, 2, 0).flatten()
            self.shapes[index] = height * 2**16 + width
        return self.slots[index, : 3 * height * width].view(height, width, 3).permute(2, 0, 1)

    def middle(self, index: int, path: Path) -> Tensor:
        """Returns evaluation's centre crop, (3, size, size)."""
        whole, size = self.whole(index, path), self.reader.size
        top, left = (whole.shape[1] - size) // 2, (whole.shape[2] - size) // 2
        return whole[:, top : top + size, left : left + size].contiguous()


def _in_file(count: int, dtype: torch.dtype) -> Tensor:
    """Allocates zeros in a file that all forked processes share."""
    handle, name = tempfile.mkstemp()
    os.close(handle)
    mapped: Tensor = torch.from_file(name, shared=True, size=count, dtype=dtype)
    os.unlink(name)
    return mapped
