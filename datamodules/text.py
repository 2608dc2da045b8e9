"""Texts with labels, from tables, folders and zip files."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from datamodules.errors import DataError, check_known
from datamodules.file_domains import FileDomains
from datamodules.folders import is_litter
from datamodules.frames import read_frame
from datamodules.labels import are_values, check_present, encode_labels, gather_classes, read_weights
from datamodules.packed import unpacked_name
from datamodules.paths import expand_path
from datamodules.splits import SPLITS, content_hash, no_labels, split_of

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".xlsx")
BYTE_ORDER = "\ufeff"  # some editors write it first
NO_TEXTS = ("README", "LICENSE", "LICENCE")  # beginnings of file names that are not texts


class Texts(Dataset[Any]):
    """Texts in memory.

    Attributes:
        targets: The labels, class numbers or real values.
        ids: The name of each text.
        groups: The group of each text, or None.
        weights: How much the loss of each text counts, or None.
        lengths: The number of characters of each text.
        unlabelled: If there are no labels, a sentence that says what is missing.
    """

    unlabelled = ""

    def __init__(self, part: Part, targets: np.ndarray[Any, Any]) -> None:
        self.texts, self.targets, self.ids = part.texts, targets, part.ids
        self.groups, self.weights = part.groups, part.weights
        self.lengths = list(map(len, part.texts))

    def __len__(self) -> int:
        return len(self.texts)

    def fingerprint(self) -> str:
        """Returns a hash of the contents."""
        return content_hash(self.targets, *self.texts)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        return self.texts[index], self.targets[index]


class TextFiles(FileDomains):
    """Texts and their labels, for either domain.

        FILE.csv .tsv .jsonl .parquet .gz ...    a table with columns `text` and `label`
        DIR/train.csv val.csv test.csv           a table for each split
        DIR/<class>/*.txt                        a folder per class, a file per text
        DIR/name.<class> or DIR/<class>.txt      a file per class, a line per text; parts common to all names are
        ignored
        DIR/train/... DIR/val/... DIR/test/...   folders or files of classes for each split
        FILE.zip                                 a zip file of any such folder
        FILE.txt                                 texts without labels, one per line

    Texts without labels are for `tl predict`, or for a target beside a source.

    Without splits, texts are split in three by the seed. Empty lines, hidden files and those named README or LICENSE
    are left out.

    Args:
        target: The target's file or folder; ~ and $VARIABLES are expanded. In Python also a polars or pandas frame or a
            data set of Hugging Face's `datasets`.
        source: The source's; its classes must be the target's.
        text: The column of the texts.
        label: The column of the labels. None: there are no labels, as in `tl predict`.
        group: A column whose groups are never divided between splits, e.g. an author.
        weight: A column that says how much the loss of each text counts, from 0 up.
        kind: Whether labels are "classes" or "values"; None: numbers with a point are values.
        classes: Names of the classes and their order; None gathers them.
        encoding: The encoding of files that are not tables.
        **kwargs: As for `TransferDataModule`.

    Raises:
        DataError: A file cannot be read or lacks a column, a text or label is missing, or the domains' classes differ.
    """

    x_schema: Mapping[str, Any] = {"text": {}}

    def __init__(
        self,
        target: Path | str | None = None,
        source: Path | str | None = None,
        text: str = "text",
        label: str | None = "label",
        group: str | None = None,
        weight: str | None = None,
        kind: Literal["classes", "values"] | None = None,
        classes: list[str] | None = None,
        encoding: str = "utf-8",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if target is None and source is None:
            raise DataError("target: give a file or folder of texts, --data.target PATH (or --data.source PATH)")
        reader = Reader(text, label, group, None if label is None else weight, encoding)
        domains = {name: given for name, given in (("source", source), ("target", target)) if given is not None}
        self.wheres = {name: where_of(given, name) for name, given in domains.items()}
        found = {name: reader.read(given, name) for name, given in domains.items()}
        labels = {
            name: [value for part in parts.values() for value in part.labels or ()]
            for name, parts in found.items()
            if any(part.labels is not None for part in parts.values())
        }
        if classes is None and label is not None:
            for name in found.keys() - labels.keys() - ({"target"} if "source" in labels else set()):
                raise DataError(f"{self.wheres[name]} has no labels; give some, or pass --data.label null")
        if are_values(chain(*labels.values()), kind, classes) or (label is None and kind is None and classes is None):
            self.class_names = None
        else:
            self.class_names = classes or gather_classes(labels, "texts")
        self._found = {
            name: {split: self._texts(part, name) for split, part in parts.items()} for name, parts in found.items()
        }

    def _texts(self, part: Part, name: str) -> Texts:
        if part.labels is not None:
            return Texts(part, encode_labels(part.labels, self.class_names, part.at))
        texts = Texts(part, np.zeros(len(part.texts), np.float32 if self.class_names is None else np.int64))
        texts.unlabelled = no_labels(part.where, "a label column or classes")
        return texts

    def parts(self, name: str) -> Mapping[str, Dataset[Any]]:
        """Returns the texts of a domain by split, as far as its files define splits."""
        return self._found[name]


def where_of(given: Any, name: str) -> str:
    """Returns the name of a domain's files for messages."""
    return f"{name}: {given if isinstance(given, str | Path) else 'the frame'}"


@dataclass
class Part:
    """The texts of a file or folder.

    Attributes:
        where: Domain and file, for messages.
        texts: N texts.
        labels: The label of each text, text or a number; None: there are no labels.
        ids: The name of each text.
        groups: The group of each text, or None.
        weights: The weight of each text, or None.
        row: What precedes the id in messages.
    """

    where: str
    texts: list[str]
    labels: list[Any] | None
    ids: list[str]
    groups: list[str] | None = None
    weights: list[float] | None = None
    row: str = ""

    def at(self, row: int) -> str:
        """Returns the name of a text for messages."""
        return f"{self.where} {self.row}{self.ids[row]}"


@dataclass
class Reader:
    """Reads texts and labels from files and folders.

    Attributes:
        text: The column of the texts.
        label: The column of the labels, or None.
        group: The column of the groups, or None.
        weight: The column of the weights, or None.
        encoding: The encoding of files that are not tables.
    """

    text: str
    label: str | None
    group: str | None
    weight: str | None
    encoding: str

    def read(self, given: Any, name: str) -> dict[str, Part]:
        """Reads the texts of a domain by split, or all as "unsplit".

        Raises:
            DataError: They cannot be read.
        """
        if not isinstance(given, str | Path):
            frame = given.to_polars() if hasattr(given, "to_polars") else given
            if hasattr(frame, "to_dict") and not hasattr(frame, "get_column"):  # pandas
                import polars

                frame = polars.from_pandas(frame)
            return {"unsplit": self._of_frame(frame, where_of(given, name))}
        path = expand_path(given, name)
        assert path is not None
        where = f"{name}: {path}"
        if path.suffix.lower() == ".zip":
            try:
                with zipfile.ZipFile(path) as file:
                    return self._of_tree(zipfile.Path(file), where)
            except zipfile.BadZipFile as error:
                raise DataError(f"{where} cannot be read as a zip file ({error})") from error
        if path.is_dir():
            return self._of_tree(path, where)
        if path.suffix.lower() == ".txt":
            return {"unsplit": self._of_files({"": [path]}, where, lines=True)}
        return {"unsplit": self._of_file(path, where)}

    def _of_file(self, path: Path, where: str) -> Part:
        names = [name for name in (self.label, self.group) if name is not None]
        return self._of_frame(read_frame(path, where, [self.text], names), where)

    def _of_frame(self, frame: Any, where: str) -> Part:
        columns: list[str] = list(frame.columns)
        check_known("text", self.text, columns, "column")
        for field, name in (("text", self.text), ("label", self.label)):
            if name in columns and frame.get_column(name).dtype.is_nested():
                raise DataError(
                    f"{field}: {where}: column {name} holds lists or objects; make one text or number of each"
                )
        texts = frame.get_column(self.text).to_list()
        part = Part(where, list(map(str, texts)), None, list(map(str, range(len(texts)))), row="row ")
        if None in texts:
            raise DataError(f"{part.at(texts.index(None))} has no text; fill it in or remove the row")
        if self.label in columns:
            part.labels = frame.get_column(self.label).to_list()
            check_present(part.labels, part.at, "label")
        if self.group is not None:
            check_known("group", self.group, columns, "column")
            part.groups = list(map(str, frame.get_column(self.group).to_list()))
        if self.weight is not None:
            check_known("weight", self.weight, columns, "column")
            part.weights = read_weights(frame.get_column(self.weight).to_list(), part.at)
        return part

    def _of_tree(self, root: Any, where: str) -> dict[str, Part]:
        while len(inner := _visible(root)) == 1 and inner[0].is_dir():
            root = inner[0]  # zip files often have a single top folder
        files = [(unpacked_name(entry.name), entry) for entry in inner if not entry.is_dir()]
        tables = {name.stem: entry for name, entry in files if name.suffix.lower() in TABLES}
        folders = {entry.name: entry for entry in inner if entry.is_dir()}
        read, parts = (self._of_table, tables) if tables else (self._of_classes, folders)
        found: dict[str, Part] = {}
        for split in SPLITS:
            names = [name for name in parts if split_of(name) == split]
            if len(names) > 1:
                raise DataError(f"{where} has {' and '.join(names)}; keep one")
            if names:
                found[split] = read(parts[names[0]], where)
        if not found and len(tables) == 1:
            return {"unsplit": self._of_table(next(iter(tables.values())), where)}
        if not found and tables:
            raise DataError(
                f"{where} has tables {', '.join(tables)}; name one of them, or call them train, val and test"
            )
        return found or {"unsplit": self._of_classes(root, where)}

    def _of_table(self, entry: Any, where: str) -> Part:
        inside = f"{where}/{entry.name}"
        if isinstance(entry, Path):
            return self._of_file(entry, inside)
        with TemporaryDirectory() as folder:  # for a zip file
            path = Path(folder, entry.name)
            path.write_bytes(entry.read_bytes())
            return self._of_file(path, inside)

    def _of_classes(self, folder: Any, where: str) -> Part:
        entries = _visible(folder)
        classes = {entry.name: list(_files(entry)) for entry in entries if entry.is_dir()}
        if classes:
            for name, files in classes.items():
                if not files:
                    raise DataError(f"{where}: class {name} is empty: there is no text in {folder.name}/{name}")
            return self._of_files(classes, where, lines=False)
        if not entries:
            raise DataError(f"{where} has no texts; it needs a folder or a file for each class")
        names = [entry.name.split(".") for entry in entries]
        # name.pos and name.neg, or pos.txt and neg.txt: the part that differs is the class
        same = [len(set(part)) == 1 for part in zip(*names, strict=False)]
        own = [".".join(p for n, p in enumerate(name) if n >= len(same) or not same[n]) for name in names]
        return self._of_files({name: [entry] for name, entry in zip(own, entries, strict=True)}, where, lines=True)

    def _of_files(self, classes: Mapping[str, Sequence[Any]], where: str, lines: bool) -> Part:
        """Reads texts of files by class: a file is one text, or each of its lines is one."""
        for field, column in (("group", self.group), ("weight", self.weight)):
            if column is not None:
                raise DataError(f"{field}: {where} is not a table, so there is no column {column}")
        part = Part(where, [], None if len(classes) == 1 else [], [])
        for label, files in classes.items():
            for file in files:
                texts = self._decode(file, where)
                found = {f"{file.name}:{n}": line for n, line in enumerate(StringIO(texts), 1)} if lines else {}
                if not lines:
                    found[f"{label}/{file.name}"] = texts
                kept = {name: text.strip() for name, text in found.items() if text.strip() or not lines}
                part.texts += kept.values()
                part.ids += kept
                if part.labels is not None:
                    part.labels += [label] * len(kept)
        if not part.texts:
            raise DataError(f"{where} has no texts")
        return part

    def _decode(self, file: Any, where: str) -> str:
        raw: bytes = file.read_bytes()
        try:
            decoded = StringIO(raw.decode(self.encoding), newline=None)  # \r and \r\n end a line too, nothing else does
            return decoded.read().removeprefix(BYTE_ORDER)
        except LookupError as error:
            raise DataError(f"encoding: unknown encoding {self.encoding}") from error
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise DataError(
                f"{where}: {file.name} line {line} is not {self.encoding}; pass --data.encoding, e.g. latin-1"
            ) from error


def _visible(folder: Any) -> list[Any]:
    """Returns the entries of a folder that may be texts, sorted by name."""
    entries = [e for e in folder.iterdir() if not is_litter(e.name) and not e.name.startswith(NO_TEXTS)]
    return sorted(entries, key=lambda entry: str(entry.name))


def _files(folder: Any) -> Iterator[Any]:
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry
