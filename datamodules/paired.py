"""Samples with several inputs: a table whose columns are an image, a text and numbers.

a row -> {"image": (3, H, W) uint8, "text": str, "row": (D,) float32}, None for an empty cell -> (x, y)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.decoding import FolderImages, ImageReader
from datamodules.errors import DataError, check_known
from datamodules.file_domains import FileDomains
from datamodules.frames import read_frame
from datamodules.labels import are_values, check_present, encode_labels, gather_classes, read_weights
from datamodules.paths import expand_path
from datamodules.splits import Subset, content_hash, no_labels, read_split

ARRAYS = (".npz", ".npy")
PIXELS = 50_000_000


class Several(Dataset[Any]):
    """Rows of a table, each with an image, a text and numbers, or some of these.

    Args:
        inputs: By name, one entry per row, None if missing: images as tensors or paths, texts, and arrays of numbers.
            With a single input x is that input, otherwise a dict.
        targets: The labels, class numbers or real values.
        groups: The group of each row, which stays together; None: no groups.
        weights: How much the loss of each row counts; None: all the same.
        reader: Reads images given as paths.

    Attributes:
        ids: The numbers of the rows.
        unlabelled: If there are no labels, a sentence that says what is missing.
    """

    unlabelled = ""

    def __init__(
        self,
        inputs: Mapping[str, Sequence[Any]],
        targets: np.ndarray[Any, Any],
        groups: Sequence[Any] | None,
        weights: Sequence[float] | None,
        reader: ImageReader,
    ) -> None:
        self.inputs, self.targets, self.reader = dict(inputs), targets, reader
        self.groups, self.weights = groups, weights
        self.ids = [str(row) for row in range(len(targets))]

    def __len__(self) -> int:
        return len(self.targets)

    def fingerprint(self) -> str:
        """Returns a hash of the contents; for image files of their paths, sizes and times."""
        parts: list[Any] = [self.targets, self.reader]
        for name, column in self.inputs.items():
            paths = [path for path in column if isinstance(path, Path)]
            files = FolderImages(paths, [0] * len(paths), self.reader).fingerprint() if paths else None
            known = torch.stack([c for c in column if c is not None]) if _tensors(column) else list(column)
            parts += [name, files, known, [cell is None for cell in column]]
        return content_hash(*parts)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.augmented(index, lambda image: image)

    def augmented(self, index: int, transform: Callable[[Tensor], Any]) -> tuple[Any, Any]:
        """Returns the sample with `transform` applied to its image."""
        x = {name: column[index] for name, column in self.inputs.items()}
        image = x.get("image")
        if isinstance(image, Path):
            image = self.reader.read(image)
        if image is not None:
            x["image"] = transform(image)
        return (x if len(x) > 1 else next(iter(x.values()))), self.targets[index]


class Paired(FileDomains):
    """A table (CSV, TSV, JSONL, parquet, Arrow, Excel) with an image, a text and numbers per row, for either domain.

        image          text            age   label   split
        img/1.png      a red rose      3     flower  train
        img/2.png                      4     tree    test       an empty cell is a missing input

    The inputs are named `image`, `text` and `row` (the numbers); a backbone for several inputs, `SeveralBackbones`, has
    a part for each. If there is only one, x is that input itself, as any backbone takes it. The ids are the numbers of
    the rows. `tl predict` takes the test split, or all rows if the table defines no splits.

    Args:
        target: The target's table; ~ and $VARIABLES are expanded.
        source: The source's table.
        image: The column of image files, relative to the table; or an .npz (its `images`) or .npy file with one image
            per row, (N, H, W, 3) uint8.
        source_image: The same for the source, if it differs.
        text: The column of texts.
        numbers: The columns of numbers.
        label: The label's column. None: there are no labels, for `tl predict`.
        kind: Whether labels are "classes" or "values"; None: numbers with a point are values.
        classes: The classes and their order; None gathers them over both domains.
        split: The column that says train, val or test; None splits the rows in three.
        group: The column whose groups are never divided between splits, e.g. a speaker.
        weight: The column that says how much the loss of each row counts, from 0 up.
        without: Inputs that are treated as missing in every row, to measure a model without them; the table need not
            have their columns.
        image_size: Side in pixels to which image files are brought; null: as the pretrained weights were evaluated.
        **kwargs: As for `TransferDataModule`.

    Raises:
        DataError: A file cannot be read, a column is missing or of another kind, a label is missing, or the domains'
            labels are of different kinds.
    """

    def __init__(
        self,
        target: Path | str | None = None,
        source: Path | str | None = None,
        image: str | None = None,
        source_image: str | None = None,
        text: str | None = None,
        numbers: list[str] | None = None,
        label: str | None = None,
        kind: Literal["classes", "values"] | None = None,
        classes: list[str] | None = None,
        split: str | None = None,
        group: str | None = None,
        weight: str | None = None,
        without: list[Literal["image", "text", "row"]] | None = None,
        image_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if target is None and source is None:
            raise DataError("target: give a table, --data.target FILE (or --data.source FILE)")
        if not (image or text or numbers):
            raise DataError("image, text, numbers: name at least one column as input")
        self.image_size = image_size
        found = {name: expand_path(path, name) for name, path in (("source", source), ("target", target)) if path}
        self.paths: dict[str, Path] = {name: path for name, path in found.items() if path is not None}
        self.wheres = {name: f"{name}: {path}" for name, path in self.paths.items()}
        texts = [column for column in (image, source_image, text) if column is not None]
        names = [column for column in (label, split, group) if column is not None]
        frames = {name: read_frame(path, self.wheres[name], texts, names) for name, path in self.paths.items()}
        weight = None if label is None else weight
        given: dict[str, Any] = {
            "image": image and {"image": {}},
            "text": text and {"text": {}},
            "row": numbers and {"numeric": numbers},
        }
        kinds = {name: what for name, what in given.items() if what}
        self.x_schema = kinds if len(kinds) > 1 else next(iter(kinds.values()))
        for absent in without or ():
            check_known("without", absent, kinds if len(kinds) > 1 else (), "removable input")
        image, source_image = (None, None) if "image" in (without or ()) else (image, source_image)
        text = None if "text" in (without or ()) else text
        numbers = None if "row" in (without or ()) else numbers
        images = {"target": image, "source": source_image or image}
        named: dict[str, str | None] = {"text": text, "label": label, "split": split, "group": group, "weight": weight}
        named |= {f"numbers: {n}": n for n in numbers or ()}
        for name, frame in frames.items():
            for field, column in (named | {"image": images[name]}).items():
                if column is not None and not column.endswith(ARRAYS):
                    check_known(f"{field.partition(':')[0]}: {self.paths[name]}", column, frame.columns, "column")
        self._labels(frames, label, kind, classes)
        self.columns: dict[str, dict[str, Sequence[Any]]] = {}
        self._of_split: dict[str, dict[str, list[int]]] = {}
        self._of_group: dict[str, Sequence[Any] | None] = {}
        self._of_weight: dict[str, list[float] | None] = {}
        for name, frame in frames.items():
            columns = self._inputs(frame, name, images[name], text, numbers)
            for missing in without or ():
                columns[missing] = [None] * len(frame)
            alone = next(iter(columns.values()))
            if len(columns) == 1 and any(cell is None for cell in alone):
                row = next(n for n, cell in enumerate(alone) if cell is None)
                raise DataError(
                    f"{self._at(name, row)}: its {next(iter(columns))} is missing, and it has no other input"
                )
            self.columns[name] = columns
            self._of_split[name] = _split_rows(frame, split, self.paths[name])
            self._of_group[name] = frame[group].to_list() if group else None
            weights = read_weights(frame[weight].to_list(), partial(self._at, name)) if weight else None
            self._of_weight[name] = weights
        self.resolve({})

    def _at(self, name: str, row: int) -> str:
        return f"{self.wheres[name]} row {row}"

    def resolve(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Also decides on the size of image files."""
        size = self.image_size or defaults.get("image_size", 224)
        resize = size if self.image_size else defaults.get("resize_size", size)
        reader = ImageReader(size, resize, defaults.get("interpolation", "bilinear"), PIXELS)
        if reader != getattr(self, "reader", None):
            self.reader = reader
            self._splits.clear()
            self._domains.clear()
        return super().resolve(defaults) | {"image_size": size}

    def parts(self, name: str) -> Mapping[str, Dataset[Any]]:
        """Returns the rows of a domain by split, as far as its table defines splits."""
        known = self._of_group[name], self._of_weight[name]
        whole = Several(self.columns[name], self.targets[name], *known, self.reader)
        whole.unlabelled = "" if self.labelled_rows else no_labels(self.wheres[name], "--data.label")
        return {part: Subset(whole, rows) for part, rows in self._of_split[name].items()} or {"unsplit": whole}

    def _inputs(
        self, frame: Any, name: str, image: str | None, text: str | None, numbers: Sequence[str] | None
    ) -> dict[str, Sequence[Any]]:
        """Returns the inputs by name, one entry per row, None if missing."""
        found: dict[str, Sequence[Any]] = {}
        if image and image.endswith(ARRAYS):
            found["image"] = _images(image, len(frame), name)
        elif image:
            folder = self.paths[name].parent
            found["image"] = [None if cell is None else folder / str(cell) for cell in frame[image].to_list()]
            for row, path in enumerate(found["image"]):
                if path is not None and not path.is_file():
                    raise DataError(f"{self._at(name, row)}: there is no image {path}")
        if text:
            found["text"] = [None if cell is None else str(cell) for cell in frame[text].to_list()]
        if numbers:
            for column in numbers:
                if not frame[column].dtype.is_numeric():
                    raise DataError(
                        f"numbers: column {column} of {self.paths[name]} is {frame[column].dtype}, not numbers"
                    )
            rows = zip(*(frame[column].to_list() for column in numbers), strict=True)
            found["row"] = [None if None in cells else torch.tensor(cells, dtype=torch.float32) for cells in rows]
        return found

    def _labels(
        self, frames: Mapping[str, Any], label: str | None, kind: str | None, classes: list[str] | None
    ) -> None:
        """Sets the targets of each domain, and the names of the classes (None for real values)."""
        self.class_names, self.labelled_rows = classes, label is not None
        if label is None:
            self.targets = {name: np.zeros(len(frame), np.int64) for name, frame in frames.items()}
            return
        cells = {name: frame[label].to_list() for name, frame in frames.items()}
        for name, own in cells.items():
            check_present(own, partial(self._at, name), f"label {label}")
        if are_values(chain(*cells.values()), kind, classes):
            self.class_names = None
        elif classes is None:
            self.class_names = gather_classes(cells, "rows", same=False)
        self.targets = {
            name: encode_labels(own, self.class_names, partial(self._at, name)) for name, own in cells.items()
        }


def _tensors(column: Sequence[Any]) -> bool:
    return isinstance(next((cell for cell in column if cell is not None), None), Tensor)


def _images(path: str, rows: int, name: str) -> list[Tensor]:
    """Reads the images of a file of arrays, (3, H, W) uint8 each."""
    file = expand_path(path, "image")
    try:
        content: Any = np.load(file, allow_pickle=False)  # type: ignore[arg-type]
        images = content["images"] if path.endswith(".npz") else content
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise DataError(f"image: {file} has no plain array of images ({error})") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(f"image: {file} has {images.dtype} of shape {images.shape}, not uint8 (N, H, W, 3)")
    if len(images) != rows:
        raise DataError(f"image: {file} has {len(images)} images, but the {name}'s table has {rows} rows")
    return list(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))


def _split_rows(frame: Any, split: str | None, path: Path) -> dict[str, list[int]]:
    """Returns the rows of each split; empty if the table does not define splits."""
    if split is None:
        return {}
    rows: dict[str, list[int]] = {}
    for row, cell in enumerate(frame[split].to_list()):
        rows.setdefault(read_split(f"split: {path} row {row}", str(cell)), []).append(row)
    return rows
