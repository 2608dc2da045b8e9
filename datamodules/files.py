"""Samples that are files of their own, read when they are needed."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar, overload

import numpy as np
from torch.utils.data import Dataset

from datamodules.errors import DataError
from datamodules.splits import content_hash, log

Key = TypeVar("Key", bound=Hashable)
Samples = TypeVar("Samples", bound="FileSamples")


class Paths(Sequence[str]):
    """Paths in one buffer: their bytes and 8 more each, which forked workers share.

    Args:
        paths: The paths.
    """

    def __init__(self, paths: Iterable[Path | str] = ()) -> None:
        self.buffer, self.ends = bytearray(), array("Q")
        self.extend(paths)

    def append(self, path: Path | str) -> None:
        """Adds a path."""
        self.buffer += os.fsencode(path)
        self.ends.append(len(self.buffer))

    def extend(self, paths: Iterable[Path | str]) -> None:
        """Adds several."""
        if isinstance(paths, Paths):
            start = len(self.buffer)
            self.buffer += paths.buffer
            self.ends.extend(start + end for end in paths.ends)
        else:
            for path in paths:
                self.append(path)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        found = range(len(self.ends))[index]
        if isinstance(found, range):
            return [self[each] for each in found]
        return os.fsdecode(bytes(self.buffer[self.ends[found - 1] if found else 0 : self.ends[found]]))

    def arrays(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Returns the bytes and the end of each path, for hashing."""
        return np.frombuffer(self.buffer, np.uint8), np.frombuffer(self.ends, np.uint64)


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
        self.ids = paths if isinstance(paths, Paths) else Paths(paths)
        self.targets, self.reader = targets, reader

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """Returns a hash of paths, sizes, mtimes and ctimes."""
        return content_hash(*self.ids.arrays(), self.stats(), self.targets, self.reader)

    def stats(self) -> np.ndarray[Any, Any]:
        """Returns size, mtime and ctime of each file, (N, 3) int64, in bytes and nanoseconds.

        Raises:
            DataError: A file no longer exists.
        """
        known = map(os.stat, self.ids)
        numbers = (number for s in known for number in (s.st_size, s.st_mtime_ns, s.st_ctime_ns))
        try:
            return np.fromiter(numbers, np.int64, 3 * len(self.ids)).reshape(-1, 3)
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
            first = self.ids[np.flatnonzero(self.targets == lost[0])[0]]
            known = f"none of its {self.what} can be read, e.g. {first}"
            raise DataError(f"{field}: class {class_names[lost[0]]} is empty: {known}")
        return kept

    @contextmanager
    def with_advice(self) -> Iterator[None]:
        """Adds advice to an error about a file that cannot be read."""
        try:
            yield
        except DataError as error:
            raise DataError(f"{error}; fix or remove it, or pass --data.{self.skip} skip") from error


def find_copies(files: Mapping[Key, Sequence[str]]) -> list[list[tuple[Key, str]]]:
    """Groups identical files, as (key, path), that are under several keys, such as splits.

    A file is opened only if one of another key has its size, and read whole only if a part of both is the same.

    Raises:
        DataError: A file does not exist or cannot be read.
    """
    groups = [[(where, path) for where, paths in files.items() for path in paths]]
    with ThreadPoolExecutor() as pool:
        for key in (os.path.getsize, _middle_hash, _hash):
            finer: list[list[tuple[Key, str]]] = []
            for group in groups:
                alike: dict[Any, list[tuple[Key, str]]] = {}
                try:
                    values = list(pool.map(key, [path for _, path in group]))
                except OSError as error:  # one that a table names
                    raise DataError(f"{error.filename}: it cannot be read ({error.strerror})") from error
                for member, value in zip(group, values, strict=True):
                    alike.setdefault(value, []).append(member)
                finer += [each for each in alike.values() if len({where for where, _ in each}) > 1]
            groups = finer
    return groups


def _middle_hash(path: str) -> bytes:
    """Hashes 4 kB from the middle of a file, because many files start alike."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) // 2 - 2048))
        return hashlib.sha256(file.read(4096)).digest()


def _hash(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()
