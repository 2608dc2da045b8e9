"""Images from folders and from arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ImageColor
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.decoding import FolderImages, ImageReader, image_extensions
from datamodules.errors import DataError
from datamodules.file_domains import FileDomains
from datamodules.files import Paths
from datamodules.folders import class_folders, files_below, files_listed, folders_listed, split_folders
from datamodules.labels import check_same_classes
from datamodules.paths import expand_path
from datamodules.splits import content_hash, log, no_labels, split_of


class ImageFolders(FileDomains):
    """One folder per class, for either domain.

        DIR/train/<class>/*.jpg   DIR/val|validation|valid/<class>/*.jpg   DIR/test/<class>/*.jpg

    Split folders may have other common names (Train, training, test_set). Without a validation folder a stratified part
    of the training images is used; without a test folder `tl test` uses the validation images and says so; without
    train/ the class folders are in DIR and are split in three. Links are followed; hidden files and system files
    (__MACOSX, Thumbs.db) are ignored; other files that are not images are counted.

    Images that are not in a class folder have no labels: `tl predict` takes them, or a single file, as its target, and
    training takes them as a target beside a source.

    Args:
        target: The target's folder, or a text file that lists its images (`files_listed`); ~ and $VARIABLES are
            expanded.
        source: The source's folder or list, or several by name, `{photo: DIR, sketch: DIR}`; its classes must be the
            target's.
        image_size: Side in pixels of the network's input. null takes it, and the next two, from the pretrained weights'
            evaluation; 224 if these are not known.
        resize_size: Length in pixels to which evaluation resizes the short side before it crops the centre; null beside
            an `image_size` is that size.
        interpolation: Of this resizing; null beside an `image_size` is bilinear.
        classes: The classes and their order; None reads them from the folders.
        on_bad_image: "raise" stops at an image that cannot be read; "skip" leaves these out and counts them, which
            reads every image once more at the start.
        max_pixels: Larger images count as bad images, found by their header before decoding.
        background: The colour behind transparent pixels, by name or as #rrggbb.
        keep_decoded: Keeps images, resized to `resize_size`, in a memory-mapped temporary file, so that only the first
            epoch decodes. Of images longer than twice their short side, augmentation sees the middle.
        num_workers: Processes that decode images; None is one per core, at most 8.
        **kwargs: As for `TransferDataModule`.

    Raises:
        DataError: A folder is missing, a class is empty, there is only one class, or the domains' classes differ.
    """

    x_schema: Mapping[str, Any] = {"image": {}}
    photos, split_is = True, "folder {names}"

    def __init__(
        self,
        target: Path | str | None = None,
        source: Path | str | dict[str, Path] | None = None,
        image_size: int | None = None,
        resize_size: int | None = None,
        interpolation: Literal["bilinear", "bicubic"] | None = None,
        classes: list[str] | None = None,
        on_bad_image: Literal["raise", "skip"] = "raise",
        max_pixels: int = 50_000_000,
        background: str = "white",
        keep_decoded: bool = False,
        num_workers: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_workers=num_workers, **kwargs)
        if target is None and not source:
            raise DataError("target: give a folder of images, --data.target DIR (or --data.source DIR)")
        sources = dict(source) if isinstance(source, Mapping) else {"": source}
        one = len(sources) == 1
        roots = {"source" if one else f"source/{name}": expand_path(path, "source") for name, path in sources.items()}
        roots["target"] = expand_path(target, "target")
        given = {name: root for name, root in roots.items() if root is not None}
        self.wheres = {name: f"{name}: {root}" for name, root in given.items()}
        lists = {name: root for name, root in given.items() if root.suffix == ".txt" and root.is_file()}
        self.listed = {name: files_listed(file) for name, file in lists.items()}
        self.roots = {name: root.parent if name in self.listed else root for name, root in given.items()}
        self.known = {name: folders_listed(self.roots[name], names) for name, names in self.listed.items()}
        self.given: dict[str, Any] = {
            "image_size": image_size,
            "resize_size": resize_size,
            "interpolation": interpolation,
        }
        self.max_pixels, self.on_bad_image, self.background = max_pixels, on_bad_image, background
        try:
            ImageColor.getrgb(background)
        except ValueError as error:
            raise DataError(f"background: {background} is not a colour; give a name or #rrggbb") from error
        self.keep_decoded = keep_decoded
        self._found: dict[str, dict[str, dict[str, Paths]]] = {}
        self.class_names = classes if classes is not None else self._read_classes()
        self.resolve({})

    def resolve(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Also decides on the size of the images and the interpolation.

        Raises:
            DataError: The sizes are not positive, or the crop is larger than the resized image.
        """
        unknown: dict[str, Any] = {"image_size": 224, "interpolation": "bilinear"}
        known = {**unknown, **defaults} if self.given["image_size"] is None else unknown
        found: dict[str, Any] = {**known, **{name: value for name, value in self.given.items() if value is not None}}
        size = found["image_size"]
        found = {name: found.get(name, size) for name in self.given}
        if not 1 <= size <= found["resize_size"]:
            raise DataError(
                f"image_size, resize_size: a side of {size} pixels cannot be cropped from a short side of "
                f"{found['resize_size']}; both must be at least 1, and resize_size the larger one"
            )
        reader = ImageReader(size, found["resize_size"], found["interpolation"], self.max_pixels, self.background)
        if reader != getattr(self, "reader", None):
            self.reader = reader
            self._splits.clear()
            self._domains.clear()
        return super().resolve(defaults) | found

    def _read_classes(self) -> list[str]:
        tops = {name: next(iter(self._folders(name).values())) for name in self.roots}
        found = {name: class_folders(top, self.known.get(name)) for name, top in tops.items()}
        if len(found) > 1 and not found.get("target", ["?"]):  # an unlabelled target beside a source
            del found["target"]
        for name, classes in found.items():
            root = self.roots[name]
            if not classes:
                raise DataError(f"{name}: {root} has no class folders; it needs {root}/train/<class>/*.jpg")
            if len(classes) == 1:
                raise DataError(f"{name}: {root} has one class, {classes[0]}; classification needs at least two")
        check_same_classes(found)
        return next(iter(found.values()))

    def _folders(self, name: str) -> dict[str, Path]:
        """Returns the folders of a tree that hold class folders, by split, or the tree itself as "unsplit"."""
        return split_folders(self.roots[name], self.known.get(name)) or {"unsplit": self.roots[name]}

    def _paths(self, name: str) -> dict[str, dict[str, Paths]]:
        """Returns image paths by split and class, "" if not in a class folder; logs what is left out."""
        if name not in self._found:
            root = self.roots[name]
            folders = self._folders(name)
            found = {
                split: {label: Paths() for label in class_folders(folder, self.known.get(name))}
                for split, folder in folders.items()
            }
            names = self.listed.pop(name, None) or ([""] if root.is_file() else files_below(root))
            split_by, extensions, others = {f.name: split for split, f in folders.items()}, image_extensions(), []
            for path in names:
                top, _, rest = path.partition("/")
                split, inside = ("unsplit", path) if "unsplit" in folders else (split_by.get(top), rest)
                if split is None or not (inside or root.name).lower().endswith(extensions):
                    others.append(path)
                else:
                    found[split].setdefault(inside.rpartition("/")[0].partition("/")[0], Paths()).append(root / path)
            if others:
                what = "not images" + ("" if "unsplit" in folders else ", or not in a split folder")
                told = "%s: left out %d files that are %s, e.g. %s"
                log.warning(told, self.wheres[name], len(others), what, others[0])
            self._found[name] = found
        return self._found[name]

    def parts(self, name: str) -> Mapping[str, Dataset[Any]]:
        """Returns the images of a tree by split, as far as its folders define splits."""
        folders = self._folders(name)
        return {split: self._read(by_class, folders[split], name) for split, by_class in self._paths(name).items()}

    def whole(self) -> Dataset[Any] | None:
        """Returns all images below the target, if it does not define several splits."""
        splits = list(self._paths("target").values()) if "target" in self.roots else []
        if len(splits) != 1:
            return None
        paths = sorted(chain(*splits[0].values()), key=lambda path: path.split(os.sep))
        if not paths:
            raise DataError(f"target: there are no images in {self.roots['target']}")
        return self._images(paths, [0] * len(paths), "target", no_labels(self.wheres["target"], "class folders"))

    def _read(self, by_class: Mapping[str, Paths], folder: Path, name: str) -> FolderImages:
        assert self.class_names is not None
        present = by_class.keys() - {""}
        loose = by_class.get("", Paths())
        if not present:
            return self._images(loose, [0] * len(loose), name, no_labels(f"{name}: {folder}", "class folders"))
        if loose:
            log.warning("%s: left out %d images in no class folder, e.g. %s", self.wheres[name], len(loose), loose[0])
        unknown = sorted(present - set(self.class_names))
        if unknown:
            advice = f"; `tl predict --data.target {folder}` takes them" if name == "target" else ""
            raise DataError(f"{name}: {folder} has classes that training lacks: {', '.join(unknown[:5])}{advice}")
        paths, targets = Paths(), list[int]()
        for number, label in enumerate(self.class_names):
            images = by_class.get(label, Paths())
            if label in present and not images:
                raise DataError(f"{name}: class {label} is empty: there are no images in {folder / label}")
            paths.extend(images)
            targets += [number] * len(images)
        return self._images(paths, targets, name)

    def _images(self, paths: Sequence[Path | str], targets: list[int], name: str, unlabelled: str = "") -> FolderImages:
        images = FolderImages(paths, targets, self.reader, self.keep_decoded)
        images.unlabelled = unlabelled
        names = None if unlabelled else self.class_names
        return images.without_bad(name, names) if self.on_bad_image == "skip" and paths else images


class ArrayImages(Dataset[Any]):
    """Images in memory, (N, C, H, W).

    Attributes:
        targets: The labels, class numbers or real values.
        ids: The name of each image, or None.
        unlabelled: If there are no labels, a sentence that says what is missing.
    """

    unlabelled = ""

    def __init__(
        self, images: np.ndarray[Any, Any], targets: np.ndarray[Any, Any], ids: list[str] | None = None
    ) -> None:
        channels_last = images if images.ndim == 4 else images[..., None]
        self.images = torch.from_numpy(np.ascontiguousarray(channels_last.transpose(0, 3, 1, 2)))
        self.targets, self.ids = targets, ids

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """Returns a hash of the contents."""
        return content_hash(self.images, self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.images[index], self.targets[index]


class ImageArrays(FileDomains):
    """Images from an .npz file, or from a folder of .npy files with the same names, for either domain.

    Keys are `images` and `labels` (split in three), or `train_images`, `train_labels`, `test_images`, ...; beside
    arrays of another split, `images` are the training images. Images are (N, H, W) or (N, H, W, 1 or 3), uint8 or float
    in [0, 1]. Integer labels 0, 1, ... are classes, floats are values.

    Args:
        target: The target's file or folder; ~ and $VARIABLES are expanded.
        source: The source's file or folder.
        classes: Names of the classes; None names them 0, 1, ...
        **kwargs: As for `TransferDataModule`.

    Raises:
        DataError: Arrays are missing, do not match, or hold values outside their range.
    """

    x_schema: Mapping[str, Any] = {"image": {}}

    def __init__(
        self,
        target: Path | str | None = None,
        source: Path | str | None = None,
        classes: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if target is None and source is None:
            raise DataError("target: give an .npz file, --data.target FILE (or --data.source FILE)")
        paths = {name: expand_path(given, name) for name, given in (("source", source), ("target", target)) if given}
        self.wheres = {name: f"{name}: {path}" for name, path in paths.items()}
        self._found = {name: _read_arrays(path, name) for name, path in paths.items() if path is not None}
        labels = {name: self._labels(name) for name in self._found}
        kinds = {name: values.dtype.kind == "f" for name, values in labels.items()}
        if len(set(kinds.values())) == 2:
            raise DataError("source, target: one has classes as labels, the other real values")
        if next(iter(kinds.values())):
            shape = next(iter(labels.values())).shape
            self.class_names, self.num_outputs = None, shape[1] if len(shape) > 1 else 1
        else:
            counts = {name: int(values.max()) + 1 for name, values in labels.items()}
            if classes is None and len(set(counts.values())) == 2:
                raise DataError(f"source, target: their classes differ: {counts['source']} and {counts['target']}")
            count = len(classes) if classes is not None else max(counts.values())
            if max(counts.values()) > count:
                raise DataError(f"classes: {count} names, but labels up to {max(counts.values()) - 1}")
            if count < 2:
                raise DataError("target: all labels are 0; classification needs at least two classes")
            self.class_names = classes or [str(number) for number in range(count)]

    def _labels(self, name: str) -> np.ndarray[Any, Any]:
        return np.concatenate([np.asarray(d.targets) for d in self._found[name].values()])  # type: ignore[attr-defined]

    def parts(self, name: str) -> Mapping[str, Dataset[Any]]:
        """Returns the images of a file by split, as far as its keys define splits."""
        return self._found[name]


def _read_arrays(path: Path, name: str) -> dict[str, Dataset[Any]]:
    """Reads the image arrays of a file or folder by split, or all as "unsplit"."""
    try:
        if path.is_dir():
            arrays = {file.stem: np.load(file, allow_pickle=False) for file in sorted(path.glob("*.npy"))}
        else:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise DataError(f"{name}: {path} is not an .npz file of plain arrays ({error})") from error
    where = f"{name}: {path}"
    found: dict[str, Dataset[Any]] = {}
    for key in arrays:
        prefix = key.removesuffix("images").removesuffix("labels")
        if prefix == key:
            continue
        split = split_of(prefix.removesuffix("_")) if prefix else "unsplit"
        if split is None:
            raise DataError(f"{where}: {key} belongs to no split; names must begin with train_, val_ or test_")
        if f"{prefix}images" not in arrays:
            raise DataError(f"{where}: {key} has no {prefix}images beside it; add them, or remove {key}")
        if key.endswith("images"):
            if split in found:
                raise DataError(f"{where}: {key} is a second array of {split} images; keep one")
            found[split] = _checked(arrays, prefix, where)
    if "unsplit" not in found and "train" not in found:
        raise DataError(f"{where} has neither images nor train_images; it has {', '.join(arrays) or 'nothing'}")
    if "unsplit" in found and "train" in found:
        raise DataError(f"{where} has both images and train_images; keep one")
    if "unsplit" in found and len(found) > 1:
        found["train"] = found.pop("unsplit")
    return found


def _checked(arrays: dict[str, Any], prefix: str, where: str) -> ArrayImages:
    images, labels = arrays[f"{prefix}images"], arrays.get(f"{prefix}labels")
    if labels is None or len(labels) != len(images):
        have = "none" if labels is None else str(len(labels))
        raise DataError(f"{where}: {prefix}labels must have one entry for each of the {len(images)} images, not {have}")
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise DataError(f"{where}: {prefix}images has shape {images.shape}, not (N, H, W) or (N, H, W, 1 or 3)")
    if images.dtype.kind == "f":
        images = images.astype(np.float32)
        if not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
            raise DataError(f"{where}: {prefix}images are floats outside [0, 1]; scale them or store uint8")
    elif images.dtype != np.uint8:
        raise DataError(f"{where}: {prefix}images are {images.dtype}; store uint8, or float in [0, 1]")
    if labels.dtype.kind == "f":
        labels = labels.astype(np.float32)
        if not np.isfinite(labels).all():
            raise DataError(f"{where}: {prefix}labels has values that are not finite")
    elif labels.dtype.kind in "iu" and labels.ndim == 1 and labels.min() >= 0:
        labels = labels.astype(np.int64)
    else:
        raise DataError(f"{where}: {prefix}labels must be whole numbers from 0 or floats")
    return ArrayImages(images, labels)
