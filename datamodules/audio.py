"""Recordings from folders, named by a pattern, or listed in a table.

files -> Listing: what is known of each file -> label, split, group -> Recordings
file -> decoded, mixed to one channel, resampled -> (x, y), x float32 (T,)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.errors import DataError
from datamodules.file_domains import FileDomains
from datamodules.files import FileSamples
from datamodules.labels import encode_labels, gather_classes, read_weights
from datamodules.listing import Listing, list_files
from datamodules.paths import expand_path
from datamodules.splits import SPLIT_NAMES, no_labels

PLAIN = (".wav", ".aif", ".aiff", ".au")  # uncompressed: the file's size tells the length
EXTENSIONS = (*PLAIN, ".flac", ".ogg", ".oga", ".opus", ".mp3")
Array = np.ndarray[Any, Any]


def soundfile() -> Any:
    """Imports the decoder.

    Raises:
        DataError: It is not installed.
    """
    try:
        import soundfile as library
    except ImportError as error:
        raise DataError("AudioFolders needs soundfile: pip install 'lightning-transfer[audio]'") from error
    return library


@dataclass(frozen=True)
class AudioReader:
    """Reads recordings as one channel of floats.

    Args:
        rate: Samples per second of the result.
        max_seconds: Of longer recordings only the middle is read.
        keep_silent: Whether a silent recording is a valid sample.
    """

    rate: int
    max_seconds: float
    keep_silent: bool

    def read(self, path: Path) -> Tensor:
        """Returns the mean of a recording's channels, (T,) float32 in [-1, 1].

        Raises:
            DataError: The file cannot be decoded, is truncated, empty or silent, or holds values that are not finite.
        """
        library = soundfile()
        try:
            with library.SoundFile(path) as file:
                rate, most = file.samplerate, max(1, int(self.max_seconds * file.samplerate))
                wanted = min(most, file.frames)
                if file.frames > most:
                    file.seek((file.frames - most) // 2)
                channels = file.read(wanted, dtype="float32", always_2d=True)
                wave = channels.mean(1)
        except (OSError, RuntimeError, TypeError, ValueError) as error:  # libsndfile's are RuntimeErrors
            reason = str(error).splitlines()[0]
            raise DataError(f"{path}: it cannot be decoded as audio ({reason})") from error
        if not len(wave):
            raise DataError(f"{path}: it is empty")
        if len(wave) < wanted:
            raise DataError(f"{path}: it is cut off after {len(wave)} of {wanted} samples")
        if not np.isfinite(wave).all():
            raise DataError(f"{path}: it holds values that are not finite")
        if not self.keep_silent and not wave.any():
            silent = "its channels cancel each other out" if channels.any() else "it is silent"
            raise DataError(f"{path}: {silent} (if that is meant, pass --data.keep_silent true)")
        return torch.from_numpy(resampled(wave, rate, self.rate))


def resampled(wave: Array, rate: int, wanted: int) -> Array:
    """Resamples a waveform (T,) to another rate.

    Raises:
        DataError: soxr is not installed.
    """
    if rate == wanted:
        return wave
    try:
        import soxr
    except ImportError as error:
        raise DataError("resampling needs soxr: pip install 'lightning-transfer[audio]'") from error
    found: Array = soxr.resample(wave, rate, wanted)
    return found if len(found) else np.zeros(1, np.float32)


def first_rate(paths: Sequence[str], field: str) -> int:
    """Returns the rate of the first recording whose header can be read.

    Raises:
        DataError: None of the first hundred can be read.
    """
    library, reason = soundfile(), ""
    for path in paths[:100]:
        try:
            return int(library.info(path).samplerate)
        except (OSError, RuntimeError) as error:
            reason = reason or f"{path}: it cannot be decoded as audio ({str(error).splitlines()[0]})"
    raise DataError(f"{field}: {reason}; fix or remove it, or give the rate")


class Recordings(FileSamples):
    """Recordings of one split, by path.

    Attributes:
        groups: The group of each recording, e.g. its speaker; None if there are no groups.
        weights: How much the loss of each recording counts, or None.
    """

    what = "recordings"
    skip = "on_bad_file"
    reader: AudioReader

    def __init__(
        self,
        paths: Sequence[Path | str],
        targets: Array,
        reader: AudioReader,
        groups: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(paths, targets, reader)
        self.groups, self.weights = groups, weights

    @cached_property
    def lengths(self) -> list[int] | None:
        """Returns the bytes of each file, a cheap measure of its length; None if some are compressed."""
        plain = all(path.lower().endswith(PLAIN) for path in self.ids)
        return self.stats()[:, 0].tolist() if plain else None

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        with self.with_advice():
            return self.reader.read(Path(self.ids[index])), self.targets[index]

    def check(self, path: Path) -> None:
        """Decodes the file."""
        self.reader.read(path)

    def taken(self, rows: Sequence[int]) -> Recordings:
        """Returns the recordings of these rows."""
        groups = None if self.groups is None else [self.groups[row] for row in rows]
        weights = None if self.weights is None else [self.weights[row] for row in rows]
        return Recordings([self.ids[row] for row in rows], self.targets[list(rows)], self.reader, groups, weights)


class AudioFolders(FileDomains):
    """Recordings in wav, flac, ogg, opus or mp3 files, for either domain (`pip install 'lightning-transfer[audio]'`).

        DIR/train/<class>/*.wav   DIR/val|validation|valid/<class>/*.wav   DIR/test/<class>/*.wav
        DIR/<class>/*.wav          with or without validation_list.txt and testing_list.txt, as in Speech Commands
        DIR/*.wav                  with `pattern`, which names the parts of the file names
        FILE.csv                   a row per file: its path, its label, and further fields

    The fields of a file come from `pattern`, from a table's columns, or from folders (`label` and `split`). A field
    `split` says train, val or test; without it the files are split in three, stratified by class, or by the groups of
    `group`. Files are opened when they are needed; folders that begin with _ or . are left out. Several channels are
    mixed to one, and all recordings are resampled to one rate. `tl predict` also takes a folder without classes.

    Args:
        target: The target's folder or table; ~ and $VARIABLES are expanded.
        source: The source's folder or table, or several by name.
        pattern: Names the parts of file names, or of paths, e.g. {label}_{speaker}_{index}.wav.
        where: Conditions on fields, by domain or split: {test: index<5}, {target: speaker=theo, source: speaker!=theo};
            several values are given as speaker=theo,lucas. Files that fulfil no split's condition are for training.
        label: The field of the label.
        group: The field whose groups are never divided between splits, e.g. speaker.
        weight: The field that says how much the loss of each recording counts, from 0 up.
        file: The table's column of paths, relative to the table.
        kind: Whether labels are classes or values.
        classes: The classes and their order; None reads them from both domains, which must have the same.
        rate: Samples per second; None takes the rate of the first recording.
        max_seconds: Of longer recordings only the middle is used.
        on_bad_file: "raise" stops at a recording that cannot be decoded, is empty or silent; "skip" leaves these out
            and counts them, which reads every file once more at the start.
        keep_silent: Accepts silent recordings.
        num_workers: Processes that decode; None is one per core, at most 8.
        **kwargs: As for `TransferDataModule`.

    Raises:
        DataError: A file or field is missing, there is only one class, or the domains' classes differ.
    """

    def __init__(
        self,
        target: Path | str | None = None,
        source: Path | str | dict[str, Path] | None = None,
        pattern: str | None = None,
        where: dict[str, str] | None = None,
        label: str = "label",
        group: str | None = None,
        weight: str | None = None,
        file: str = "file",
        kind: Literal["classes", "values"] = "classes",
        classes: list[str] | None = None,
        rate: int | None = None,
        max_seconds: float = 30.0,
        on_bad_file: Literal["raise", "skip"] = "raise",
        keep_silent: bool = False,
        num_workers: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_workers=num_workers, **kwargs)
        if target is None and not source:
            raise DataError("target: give a folder of recordings or a table of them, --data.target PATH")
        if (rate is not None and rate < 1) or max_seconds <= 0:
            raise DataError(f"rate, max_seconds: {rate} and {max_seconds} must be above 0")
        sources = dict(source) if isinstance(source, Mapping) else {"": source}
        named = {f"source/{name}" if name else "source": path for name, path in sources.items()} | {"target": target}
        self.roots = {name: path for name, given in named.items() if (path := expand_path(given, name)) is not None}
        self.wheres = {name: f"{name}: {root}" for name, root in self.roots.items()}
        self.where = dict(where or {})
        known = {*self.roots, *SPLIT_NAMES, *(["source"] if source else [])}
        for unknown in sorted(self.where.keys() - known):
            raise DataError(f"where: there is no domain or split {unknown}; there are {', '.join(sorted(known))}")
        self.pattern, self.file, self.label = pattern, file, label
        self.group, self.weight = group, weight
        self.on_bad_file = on_bad_file
        self.conditions = {key: text for key, text in self.where.items() if key in SPLIT_NAMES}
        self._found: dict[Path, Listing] = {}
        if rate is None:
            rate = first_rate(self._files(next(reversed(self.roots.values()))).paths, "rate")
        self.reader = AudioReader(rate, max_seconds, keep_silent)
        self.x_schema = {"audio": {"rate": rate}}
        self.class_names = None if kind == "values" else classes
        if kind == "classes" and classes is None:
            labels = {name: self._listing(name).field("label", self.label).tolist() for name in self.roots}
            self.class_names = gather_classes(labels, "recordings")

    def resolve(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Also decides on the rate to which later recordings are resampled."""
        return super().resolve(defaults) | {"rate": self.reader.rate}

    def parts(self, name: str) -> Mapping[str, Dataset[Any]]:
        """Returns the recordings of a domain by split, as far as folders or fields name splits."""
        listing = self._listing(name)
        return {part: self._read(listing.taken(rows), name) for part, rows in listing.splits(self.conditions).items()}

    def whole(self) -> Dataset[Any] | None:
        """Returns all recordings of the target if nothing says how they are split or labelled."""
        if "target" not in self.roots:
            return None
        listing = self._files(self.roots["target"])
        if self.label in listing.fields:
            listing = self._listing("target")
            if len(listing.splits(self.conditions)) > 1:
                return None
        return self._without_bad(
            Recordings(listing.paths, np.zeros(len(listing.paths), np.int64), self.reader), "target"
        )

    def _files(self, root: Path) -> Listing:
        """Lists all files of a folder or table."""
        if root not in self._found:
            self._found[root] = list_files(root, EXTENSIONS, self.pattern, self.file)
        return self._found[root]

    def _listing(self, name: str) -> Listing:
        """Lists the files of a domain."""
        listing = self._files(self.roots[name])
        for key in dict.fromkeys((name.partition("/")[0], name)):
            if key in self.where:
                rows = np.flatnonzero(listing.matches(f"where.{key}", self.where[key]))
                if not len(rows):
                    raise DataError(f"where.{key}: no file of {listing.where} fulfils {self.where[key]}")
                listing = listing.taken(rows)
        return listing

    def _read(self, listing: Listing, name: str) -> Recordings:
        if self.label == "label" and not any(listing.fields.get("label", [""])):  # a split without class folders
            found = Recordings(listing.paths, np.zeros(len(listing.paths), np.int64), self.reader)
            found.unlabelled = no_labels(f"{name}: {listing.where}", "class folders")
            return self._without_bad(found, name)
        labels = listing.field("label", self.label)

        def at(row: int) -> str:
            return f"{name}: {listing.paths[row]}"

        targets = encode_labels(labels, self.class_names, at)
        groups = None if self.group is None else listing.field("group", self.group).tolist()
        weights = None if self.weight is None else read_weights(listing.field("weight", self.weight), at)
        return self._without_bad(Recordings(listing.paths, targets, self.reader, groups, weights), name)

    def _without_bad(self, recordings: Recordings, name: str) -> Recordings:
        names = None if recordings.unlabelled else self.class_names
        return recordings.without_bad(name, names) if self.on_bad_file == "skip" else recordings
