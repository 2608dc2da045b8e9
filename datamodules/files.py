"""Samples that are files of their own, read when they are needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from torch.utils.data import Dataset

from datamodules.errors import DataError
from datamodules.splits import content_hash, log

Samples = TypeVar("Samples", bound="FileSamples")


class FileSamples(Dataset[Any]):
    """Samples of one split, by path; a subclass writes `__getitem__`, `check` and `taken`.

    Attributes:
        what: What messages call the files, e.g. "images".
        skip: The option that leaves out files that cannot be read.
        ids: The paths.
        targets: The class numbers, or real values.
        reader: Reads a file.
        unlabelled: If there are no labels, a sentence that says what is missing.
    """

    unlabelled: str = ""
    what: ClassVar[str] = "files"
    skip: ClassVar[str] = ""

    def __init__(self, paths: Sequence[Path | str], targets: np.ndarray[Any, Any], reader: Any) -> None:
        self.ids = [str(path) for path in paths]
        self.targets, self.reader = targets, reader

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """Returns a hash of paths, sizes, mtimes and ctimes."""
        stats = zip(self.ids, self.stats(), strict=True)
        files = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]
        return content_hash(files, self.targets, self.reader)

    def stats(self) -> list[os.stat_result]:
        """Returns what the file system says about each file.

        Raises:
            DataError: A file no longer exists.
        """
        try:
            return [os.stat(path) for path in self.ids]
        except OSError as error:
            raise DataError(f"{error.filename}: it cannot be read any more ({error.strerror})") from error

    def check(self, path: Path) -> None:
        """Checks, as cheaply as possible, that a file can be read.

        Raises:
            DataError: It cannot be read.
        """
        raise NotImplementedError

    def taken(self: Samples, rows: Sequence[int]) -> Samples:
        """Returns the samples of these rows."""
        raise NotImplementedError

    def without_bad(self: Samples, field: str, class_names: Sequence[str] | None = None) -> Samples:
        """Returns the samples whose files can be read, and logs how many are left out.

        Raises:
            DataError: No file, or no file of a class, can be read.
        """

        def readable(path: str) -> bool:
            try:
                self.check(Path(path))
            except DataError as error:
                log.warning("skipped: %s", error)
                return False
            return True

        with ThreadPoolExecutor() as pool:
            good = list(pool.map(readable, self.ids))
        if not any(good):
            raise DataError(f"{field}: none of its {len(good)} {self.what} can be read")
        if not all(good):
            log.warning("%s: skipped %d of %d %s", field, good.count(False), len(good), self.what)
        kept = self.taken(np.flatnonzero(good).tolist())
        kept.unlabelled = self.unlabelled
        if class_names and (lost := np.setdiff1d(self.targets, kept.targets).tolist()):
            raise DataError(f"{field}: class {class_names[lost[0]]} is empty: none of its {self.what} can be read")
        return kept

    @contextmanager
    def with_advice(self) -> Iterator[None]:
        """Adds advice to an error about a file that cannot be read."""
        try:
            yield
        except DataError as error:
            raise DataError(f"{error}; fix or remove it, or pass --data.{self.skip} skip") from error


def find_copies(files: Mapping[str, Sequence[str]]) -> list[list[tuple[str, str]]]:
    """Groups identical files, as (split, path), that are in several splits.

    A file is opened only if one of another split has its size, and read whole only if a part of both is the same.

    Raises:
        DataError: A file does not exist or cannot be read.
    """
    groups = [[(split, path) for split, paths in files.items() for path in paths]]
    with ThreadPoolExecutor() as pool:
        for key in (os.path.getsize, _middle_hash, _hash):
            finer: list[list[tuple[str, str]]] = []
            for group in groups:
                alike: dict[Any, list[tuple[str, str]]] = {}
                try:
                    values = list(pool.map(key, [path for _, path in group]))
                except OSError as error:  # one that a table names
                    raise DataError(f"{error.filename}: it cannot be read ({error.strerror})") from error
                for member, value in zip(group, values, strict=True):
                    alike.setdefault(value, []).append(member)
                finer += [each for each in alike.values() if len({split for split, _ in each}) > 1]
            groups = finer
    return groups


def _middle_hash(path: str) -> bytes:
    """Hashes 4 kB from the middle of a file, because many files start alike."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) // 2 - 2048))
        return hashlib.sha256(file.read(4096)).digest()


def _hash(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()
